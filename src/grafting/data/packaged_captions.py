"""Captions that ship with the package, encoded: names of emoji, for `pixart-emoji`, which ships without a text encoder.

Axes: B captions, T tokens that captions are padded to, E width of the text encoder.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from grafting.assets import asset_path
from grafting.conditioning import Caption
from grafting.data.dataset import Indices
from grafting.data.prompts import read_prompts
from grafting.data.text import unpack_captions
from grafting.formats import weights

PACKAGED = {"emoji-train": "train", "emoji-held-out": "held-out"}  # name -> part of the files
_TEXTS, _EMBEDS = "pixart-emoji/captions.json", "pixart-emoji/captions.safetensors"


def is_packaged(name: str | Path) -> bool:
    """Whether captions of this name ship with the package."""
    return str(name) in PACKAGED


def check_prompts(prompts: str | Path) -> None:
    """Raise DataError unless `prompts` is a packaged name or a file of prompts."""
    if not is_packaged(prompts):
        read_prompts(prompts)


class PackagedCaptions:
    """Captions by packaged name: `emoji-train` (names that `pixart-emoji` was trained on) or `emoji-held-out`.

    `labels` are the groups of the emoji (`grafting.evaluation.emoji_classifier.GROUPS`). The order goes round the
    groups; of the held-out names those of small groups come more than once, so that every group has as many.
    """

    def __init__(self, name: str) -> None:
        part = PACKAGED[name]
        path = asset_path(_EMBEDS)
        held = weights.read_safetensors(path)
        texts = weights.read_json(asset_path(_TEXTS), "packaged captions")
        self.name = name
        self.num_tokens: int = texts["num_tokens"]
        rows: list[int] = texts[part]["rows"]
        self.captions: list[str] = [texts[part]["captions"][row] for row in rows]
        self.labels: list[int] | None = [texts[part]["groups"][row] for row in rows]
        self._rows = torch.tensor(rows)
        self._embeds, self._offsets = held[f"{part}.embeds"], held[f"{part}.offsets"]
        self._null = held["null.embeds"]

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the texts and their embeddings."""
        digest = hashlib.sha256("\n".join(self.captions).encode())
        digest.update(self._embeds.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def caption_width(self) -> int:
        """E."""
        return self._embeds.shape[1]

    @property
    def null(self) -> Tensor:
        """The encoded empty caption [L, E], which has no padding."""
        return self._null

    def conditions(self, indices: Indices) -> Caption:
        """The captions at these positions, padded to T, on the CPU."""
        rows = self._rows[torch.as_tensor(indices, dtype=torch.int64).reshape(-1)].tolist()
        held = {"embeds": self._embeds, "mask": torch.ones(len(self._embeds), dtype=torch.uint8)}
        empty = {"embeds": self._null, "mask": torch.ones(len(self._null), dtype=torch.uint8)}
        length = torch.tensor([0, len(self._null)])
        embeds, mask = unpack_captions(held, rows, self.num_tokens, self._offsets)
        null_embeds, null_mask = unpack_captions(empty, [0] * len(rows), self.num_tokens, length)
        return Caption(embeds, mask, null_embeds, null_mask)

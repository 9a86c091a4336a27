"""Caption datasets: latents with encoded captions, in a folder of shards that are read where they are needed.

    captions.json             format, protocol, shapes, and the SHA-256 of every file below
    captions.jsonl            {"caption": ...}, one a line, in order
    null.safetensors          the encoded empty caption: embeds [L, E], mask [L]
    text-00000.safetensors    captions of a shard: embeds [sum L, E], mask [sum L], offsets [n + 1]
    latents-00000.safetensors x [n, C, H, W] float32

Axes: N samples, C channels, H W latent height and width, L tokens of one caption, T tokens that captions are padded to,
E width of the text encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from grafting import draws
from grafting.conditioning import Caption
from grafting.data.dataset import Indices
from grafting.errors import DataError
from grafting.formats import weights

FORMAT, VERSION = "grafting-captions", 1
MANIFEST = "captions.json"


def is_caption_folder(folder: Path) -> bool:
    """Whether `folder` is what `graft synthesize` makes, finished or not."""
    return (folder / MANIFEST).is_file()


def text_file(shard: int) -> str:
    """Name of a shard's file of captions."""
    return f"text-{shard:05d}.safetensors"


def latents_file(shard: int) -> str:
    """Name of a shard's file of latents."""
    return f"latents-{shard:05d}.safetensors"


def pack_captions(embeds: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Captions [n, T, E] and masks [n, T] without their padding: what a text file holds."""
    positions = torch.arange(1, mask.shape[1] + 1)
    lengths = (mask.cpu().ne(0) * positions).amax(dim=1).tolist()
    rows = list(zip(embeds.cpu(), mask.cpu(), lengths, strict=True))
    return {
        "embeds": torch.cat([row[:length] for row, _, length in rows]),
        "mask": torch.cat([row[:length].to(torch.uint8) for _, row, length in rows]),
        "offsets": torch.tensor([0, *np.cumsum(lengths).tolist()]),
    }


def unpack_captions(
    held: Mapping[str, Any], rows: Sequence[int], num_tokens: int, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Some captions of a text file padded to [n, T, E], with masks [n, T]; `held` has slices or tensors."""
    embeds = mask = None
    for position, row in enumerate(rows):
        start, end = int(offsets[row]), int(offsets[row + 1])
        part = held["embeds"][start:end]
        if embeds is None or mask is None:
            embeds = part.new_zeros(len(rows), num_tokens, part.shape[1])
            mask = torch.zeros(len(rows), num_tokens, dtype=torch.uint8)
        embeds[position, : end - start] = part
        mask[position, : end - start] = held["mask"][start:end]
    if embeds is None or mask is None:
        raise DataError("no captions were asked for")
    return embeds, mask


class CaptionSource(Protocol):
    """Captions to sample by: a `CaptionDataset`, or the prompts of a file (`data.prompts.EncodedPrompts`)."""

    @property
    def name(self) -> str: ...

    @property
    def content_hash(self) -> str: ...

    @property
    def captions(self) -> list[str]: ...

    @property
    def labels(self) -> list[int] | None:
        """Class number of each caption, where captions have one."""
        ...

    def __len__(self) -> int: ...

    def conditions(self, indices: Indices) -> Caption: ...


class CaptionDataset:
    """Latents x [N, C, H, W] float32 with captions; a `DataSource` whose conditioning is a `Caption`.

    Raises DataError for a folder that is not one, was not finished, or is damaged (each file is checked against its
    hash when it is first read).
    """

    num_classes = 0
    labels: list[int] | None = None

    def __init__(self, folder: str | Path, rows: Tensor | None = None, name: str | None = None) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if not manifest["complete"]:
            raise DataError(
                f"{str(self.folder)!r} is not finished: go on with the same `graft synthesize` and --resume"
            )
        self.protocol: dict[str, Any] = manifest["protocol"]
        channels, height, width = manifest["shape"]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self.caption_width: int = manifest["caption_width"]
        self.num_tokens: int = manifest["num_tokens"]
        self.shard_size: int = self.protocol["shard_size"]
        self._hashes: dict[str, str] = manifest["files"]
        for file in self._hashes:
            if not (self.folder / file).is_file():
                raise DataError(f"{str(self.folder)!r} has lost {file}; make it again with graft synthesize")
        self.rows = torch.arange(manifest["num"]) if rows is None else rows
        self.name = name or self.folder.resolve().name
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"CaptionDataset({self.name!r}: {len(self)} x {list(self.shape)}, captions [{self.caption_width}])"

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the hashes of all files and the rows used; the name is not part of it."""
        digest = hashlib.sha256("".join(f"{k} {v}\n" for k, v in sorted(self._hashes.items())).encode())
        digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def captions(self) -> list[str]:
        """The texts, in order."""
        self._check("captions.jsonl")
        lines = (self.folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["caption"] for line in lines]
        return [texts[row] for row in self.rows.tolist()]

    def batch(self, indices: Indices) -> tuple[Tensor, Caption]:
        """(x float32 [B, C, H, W], captions padded to T) of the examples at `indices`, on the CPU."""
        rows = self._rows(indices)
        x = torch.stack(
            [self._held(latents_file(shard), "x")["x"][row : row + 1][0] for shard, row in self._places(rows)]
        )
        return x, self._captions(rows)

    def conditions(self, indices: Indices) -> Caption:
        """The captions alone, for sampling."""
        return self._captions(self._rows(indices))

    def split(self, num_validation: int, seed: int = 0) -> tuple[CaptionDataset, CaptionDataset]:
        """Hold out `num_validation` examples: returns (training part, validation part)."""
        if not 1 <= num_validation < len(self):
            raise DataError(
                f"{self.name}: cannot hold out {num_validation} of {len(self)} examples; ask for 1 to {len(self) - 1}"
            )
        order = draws.permutation(seed, "captions/validation", 0, len(self))
        held, kept = order[:num_validation].sort().values, order[num_validation:].sort().values
        return self._part(kept, "train"), self._part(held, "validation")

    def subset(self, fraction: float, seed: int = 0) -> CaptionDataset:
        """A random `fraction` (0 < fraction <= 1, at least one example), in the original order."""
        if not 0.0 < fraction <= 1.0:
            raise DataError(f"{self.name}: fraction must be in (0, 1], got {fraction}")
        order = draws.permutation(seed, "captions/subset", 0, len(self))
        chosen = order[: max(1, round(fraction * len(self)))].sort().values
        return self._part(chosen, f"{fraction:g}, seed {seed}")

    def _part(self, chosen: Tensor, what: str) -> CaptionDataset:
        return CaptionDataset(self.folder, self.rows[chosen], f"{self.name}[{what}]")

    def _rows(self, indices: Indices) -> list[int]:
        index = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise DataError(
                f"{self.name}: index {int(index.min())}..{int(index.max())} is outside 0..{len(self) - 1}"
            )
        return self.rows[index].tolist()

    def _places(self, rows: list[int]) -> list[tuple[int, int]]:
        return [divmod(row, self.shard_size) for row in rows]

    def _captions(self, rows: list[int]) -> Caption:
        parts = []
        for shard, row in self._places(rows):
            held = self._held(text_file(shard), "embeds", "mask", "offsets")
            parts.append(unpack_captions(held, [row], self.num_tokens, held["offsets"][:]))
        embeds, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        null = self._held("null.safetensors", "embeds", "mask")
        length = len(null["mask"][:])
        null_embeds = embeds.new_zeros(1, *embeds.shape[1:])
        null_mask = mask.new_zeros(1, self.num_tokens)
        null_embeds[0, :length], null_mask[0, :length] = null["embeds"][:], null["mask"][:]
        return Caption(
            embeds, mask, null_embeds.expand(len(embeds), -1, -1), null_mask.expand(len(embeds), -1)
        )

    def _held(self, file: str, *names: str) -> dict[str, Any]:
        """Slices of the tensors of a file, which is checked against its hash at its first use."""
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            self._check(file)
            try:
                opened = safe_open(self.folder / file, framework="pt")
                self._open[file] = {name: opened.get_slice(name) for name in names}
            except (SafetensorError, OSError) as error:
                raise DataError(f"cannot read {self.folder / file}: {error}; make it again") from None
        return self._open[file]

    def _check(self, file: str) -> None:
        if file_digest(self.folder / file) != self._hashes.get(file):
            raise DataError(
                f"{self.folder / file} is damaged: its hash is not the one in {MANIFEST}; copy it again"
            )


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of captions.json. Raises DataError."""
    if not is_caption_folder(folder):
        raise DataError(
            f"{str(folder)!r} is no caption dataset: it has no {MANIFEST}; make one with graft synthesize"
        )
    manifest = weights.read_json(folder / MANIFEST, "caption dataset")
    kinds = {"protocol": dict, "shape": list, "caption_width": int, "num_tokens": int, "num": int, "files": dict,
             "complete": bool}  # fmt: skip
    known = manifest.get("format") == FORMAT and manifest.get("version") == VERSION
    bad = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if not known or bad:
        what = (
            f"key {bad[0]!r} is missing or of another kind"
            if known
            else f"expected format {FORMAT!r} version {VERSION}"
        )
        raise DataError(f"{folder / MANIFEST}: {what}")
    return manifest

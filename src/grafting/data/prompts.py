"""Prompts in, encoded captions out: the prompt file, and the text encoder of a pipeline.

Axes: B captions, T tokens that captions are padded to, E width of the text encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grafting.conditioning import Caption
from grafting.data.dataset import Indices
from grafting.data.text import pack_captions, unpack_captions
from grafting.errors import CheckpointError, DataError
from grafting.formats.diffusers_folder import variant_of
from grafting.formats.pipeline_folder import INDEX, MAX_TOKENS, component_class, fitting_class, read_index

KEYS = ("prompt", "caption", "text")
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Prompt:
    """A caption and the line of the file it stands in (from 1)."""

    line: int
    text: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file: one a line, or (`.jsonl`, `.json`) one JSON object a line with a key prompt, caption or text.

    Raises DataError that names the line for an empty caption and for anything that is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"no prompts file {str(path)!r}: expected a text file with one prompt a line, or JSON lines"
        )
    if path.stat().st_size > _MAX_BYTES:
        raise DataError(f"{path} has more than {_MAX_BYTES >> 30} GiB; give a file of prompts")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text; give one prompt a line, or JSON lines") from None
    while lines and not lines[-1].strip():
        lines.pop()
    as_json = path.suffix in (".jsonl", ".json") or (bool(lines) and lines[0].lstrip().startswith('{"'))
    prompts = [
        Prompt(n, _parse(line, n, path) if as_json else line.strip()) for n, line in enumerate(lines, 1)
    ]
    for prompt in prompts:
        if not prompt.text:
            raise DataError(
                f"{path}, line {prompt.line}: the caption is empty; give a prompt, or take the line out"
            )
    if not prompts:
        raise DataError(f"{path} has no prompts; give one a line")
    return prompts


def _parse(line: str, number: int, path: Path) -> str:
    where = f"{path}, line {number}"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(
            f'{where}: not a JSON object; expected one a line, such as {{"prompt": "a cat"}}'
        ) from None
    if not isinstance(data, dict):
        raise DataError(
            f"{where}: a JSON {type(data).__name__}; expected an object with a key {' or '.join(KEYS)}"
        )
    text = next((data[key] for key in KEYS if key in data), None)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: no text under {' or '.join(KEYS)}; it has {', '.join(map(str, data)) or 'nothing'}"
        )
    return text.strip()


class CaptionTokenizer:
    """Tokenizer of a pipeline folder. Captions are lowered and stripped, as the pipeline does.

    transformer: configuration of the transformer that the captions are for: it says how many tokens they may have,
    where the folder is another transformer's.
    """

    def __init__(
        self, folder: Path, transformer: Mapping[str, Any], *, max_tokens: int | None = None
    ) -> None:
        index = read_index(folder)
        self.max_tokens = max_tokens or MAX_TOKENS[fitting_class(index["_class_name"], transformer)]
        self._encoder_class = _component(index, "text_encoder", folder)
        if not (folder / "text_encoder" / "config.json").is_file():
            raise CheckpointError(
                f"the pipeline {str(folder)!r} has no text_encoder/config.json; copy it again"
            )
        kind = _component(index, "tokenizer", folder)
        self.tokenizer: Any = _loading(folder, lambda: kind.from_pretrained(folder / "tokenizer"))

    def check_lengths(self, prompts: Sequence[Prompt], where: str) -> None:
        """Raise DataError that names the first prompt with more tokens than the model takes."""
        for start in range(0, len(prompts), 1000):
            part = prompts[start : start + 1000]
            for prompt, ids in zip(
                part, self.tokenizer([_plain(p.text) for p in part]).input_ids, strict=True
            ):
                if len(ids) > self.max_tokens:
                    raise DataError(
                        f"{where}, line {prompt.line}: {len(ids)} tokens, the model takes {self.max_tokens}: "
                        f"{prompt.text[:60]!r}...; shorten it, or give --truncate (in a recipe, truncate: true beside "
                        "prompts)"
                    )


class TextEncoder(CaptionTokenizer):
    """Tokenizer and text encoder of a pipeline folder."""

    def __init__(
        self, folder: Path, transformer: Mapping[str, Any], *, device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None, max_tokens: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, transformer, max_tokens=max_tokens)
        self.device, place = torch.device(device), folder / "text_encoder"
        variant = variant_of(place)
        dtype = dtype or (torch.float32 if variant else None)  # stored in float16, which T5 overflows in
        given = {"dtype": dtype} if dtype else {}
        model = _loading(folder, lambda: self._encoder_class.from_pretrained(place, variant=variant, **given))
        self.model: Any = model.to(self.device).eval()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, E] and masks [B, T] of captions, on the encoder's device."""
        tokens = self.tokenizer(
            [_plain(text) for text in texts], padding="max_length", max_length=self.max_tokens, truncation=True,
            add_special_tokens=True, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        return self.model(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask


class EncodedPrompts:
    """The captions of a prompt file, encoded and held in memory without padding, in the text encoder's type.

    The text encoder itself is not kept. transformer: see `CaptionTokenizer`.
    """

    labels: list[int] | None = None

    def __init__(
        self, path: str | Path, folder: Path, transformer: Mapping[str, Any], *, device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None, limit: int | None = None, truncate: bool = False, batch_size: int = 8,
    ) -> None:  # fmt: skip
        prompts = read_prompts(path)[:limit]
        self.name, self.captions = Path(path).name, [prompt.text for prompt in prompts]
        encoder = TextEncoder(folder, transformer, device=device, dtype=dtype)
        if not truncate:
            encoder.check_lengths(prompts, str(path))
        chunks = [self.captions[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        parts = [pack_captions(*encoder.encode(chunk)) for chunk in chunks]
        self.held = {name: torch.cat([part[name] for part in parts]) for name in ("embeds", "mask")}
        lengths = torch.cat([part["offsets"].diff() for part in parts])
        self.held["offsets"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)])
        self.null, self.num_tokens = pack_captions(*encoder.encode([""])), encoder.max_tokens

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the texts."""
        return hashlib.sha256("\n".join(self.captions).encode()).hexdigest()

    def conditions(self, indices: Indices) -> Caption:
        """The captions of these prompts."""
        rows = torch.as_tensor(indices, dtype=torch.int64).reshape(-1).tolist()
        given = unpack_captions(self.held, rows, self.num_tokens, self.held["offsets"])
        null_embeds, null_mask = unpack_captions(self.null, [0], self.num_tokens, self.null["offsets"])
        return Caption(*given, null_embeds.expand(len(rows), -1, -1), null_mask.expand(len(rows), -1))


def _component(index: dict[str, Any], name: str, folder: Path) -> Any:
    """The class of a component of a pipeline that transformers provides."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError("encoding captions needs transformers: pip install 'grafting[text]'") from None
    known = component_class(index, name, folder)
    if not hasattr(transformers, known):
        raise CheckpointError(
            f"{folder / INDEX}: {name} is a {known!r}, which transformers here does not have"
        )
    return getattr(transformers, known)


def _loading(folder: Path, load: Callable[[], Any]) -> Any:
    """What `load` returns. Raises CheckpointError that names the pipeline."""
    try:
        return load()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"can't load the text encoder of {str(folder)!r}: {reason[:200]}") from None


def _plain(text: str) -> str:
    return text.lower().strip()

"""`latents.json`: what a folder of latents holds, how it was made, and the hash of every file in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grafting.errors import DataError
from grafting.yaml_io import load_json

MANIFEST, SKIPPED = "latents.json", "skipped.jsonl"
VERSION = 1
MAX_SHARDS = 4000

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=2**48)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Part):
    """One file: images [first, first + span) of the source, less those that were skipped."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}\.safetensors$")]  # a name, never a path
    first: Size
    span: Size
    num: Size
    size: Size
    sha256: Digest


class VAE(_Part):
    """The autoencoder that made the latents."""

    source: str
    sha256: Digest
    encoder_sha256: Digest
    scaling_factor: Annotated[float, Field(allow_inf_nan=False, gt=0)]
    shift_factor: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    mode: Literal["sample", "mean"]
    seed: int
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    device: str
    batch_size: int


class Images(_Part):
    """What was encoded."""

    kind: str
    name: str
    num: Size
    sha256: Digest  # of names, sizes and labels


class Manifest(_Part):
    """A whole set of latents: num images, their shape, classes, and the shards in order."""

    format: Literal["grafting-latents"] = "grafting-latents"
    version: Literal[1] = 1
    sha256: Digest  # of everything that says what the latents are, see `content_hash`
    num: Size
    num_skipped: Size
    shape: tuple[Side, Side, Side]
    dtype: Literal["float32", "bfloat16", "float16"]
    flip: bool
    num_classes: Annotated[int, Field(ge=1, lt=2**31)]
    class_names: list[str] | None
    labelled: bool
    vae: VAE
    images: Images
    preprocessing: dict[str, Any]
    shard_size: Annotated[int, Field(ge=1)]
    environment: dict[str, str]
    shards: Annotated[list[Shard], Field(max_length=MAX_SHARDS)]


# What decides the bytes of the latents; the rest of a manifest follows from it and the images.
JOB = (
    "shape", "dtype", "flip", "num_classes", "class_names", "labelled", "vae", "images", "preprocessing", "shard_size",
)  # fmt: skip


def content_hash(fields: dict[str, Any]) -> str:
    """SHA-256 over type, shape, classes and the hashes of the shards: equal for equal latents, whoever made them."""
    kept = {key: fields[key] for key in ("version", "shape", "dtype", "flip", "num_classes", "num")}
    kept["shards"] = [shard["sha256"] for shard in fields["shards"]]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder of latents, checked. Raises `DataError` that names what is wrong."""
    path = Path(folder) / MANIFEST
    data = load_json(path, "latents", DataError)
    try:
        found = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise DataError(
            f"{path} is no manifest of latents: {where}: {first['msg']}; encode the images again with graft encode"
        ) from None
    if len({shard.file for shard in found.shards}) < len(found.shards):
        raise DataError(f"{path} names a shard twice; encode the images again with graft encode")
    if sum(shard.num for shard in found.shards) != found.num:
        raise DataError(f"{path}: the shards hold {sum(s.num for s in found.shards)} images, not {found.num}")
    if content_hash(found.model_dump(mode="json")) != found.sha256:
        raise DataError(f"{path} was changed by hand: its hash is not that of what it says; restore it")
    return found

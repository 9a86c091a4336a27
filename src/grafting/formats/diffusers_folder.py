"""Transformers in diffusers' layout: config.json and its weights, in one file or in several with an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from grafting.errors import CheckpointError
from grafting.families import families
from grafting.formats import weights
from grafting.plugins import HOW

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_HALF = "fp16"  # the variant that is read where there are no others


def transformer_folder(folder: Path) -> Path | None:
    """Where the transformer is in a model's or pipeline's folder: `folder` itself or its `transformer`."""
    return next((at for at in (folder, folder / "transformer") if (at / "config.json").is_file()), None)


def variant_of(folder: Path) -> str | None:
    """The variant that the weights in a folder of a component are of: fp16 where no plain ones are there, else None."""
    names = [path.name for suffix in ("safetensors", "bin") for path in folder.glob(f"*.{suffix}")]
    return _HALF if names and all(f".{_HALF}" in name for name in names) else None


def read_transformer(folder: Path) -> nn.Module:
    """The model in a folder with a config.json, by the family that knows its class. Raises CheckpointError."""
    config = weights.read_json(folder / "config.json", "diffusers configuration")
    for family in families().values():
        if family.reads(config):
            return family.from_diffusers(config, _read_tensors(folder), str(folder))
    raise CheckpointError(
        f"{folder / 'config.json'} describes a {config.get('_class_name')!r}; expected diffusers' "
        f"DiTTransformer2DModel or PixArtTransformer2DModel; for a model of another family, {HOW}"
    )


def _read_tensors(folder: Path) -> dict[str, Any]:
    for path, index in _places(folder):
        if path.is_file():
            return _read(path)
        if index.is_file():
            files = weights.read_json(index, "weight index").get("weight_map")
            if not isinstance(files, dict) or not all(_plain(file) for file in files.values()):
                raise CheckpointError(f"{index} does not say which tensor is in which file of its folder")
            found: dict[str, Any] = {}
            for file in sorted(set(files.values())):
                found |= _read(folder / file)
            return found
    raise CheckpointError(f"the folder {str(folder)!r} holds no weights: expected {' or '.join(_WEIGHTS)}")


def _places(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Where weights can be, whole or by an index, those of full precision first."""
    for name in _WEIGHTS:
        yield folder / name, folder / f"{name}.index.json"
    for name in _WEIGHTS:
        stem, _, suffix = name.rpartition(".")
        yield folder / f"{stem}.{_HALF}.{suffix}", folder / f"{name}.index.{_HALF}.json"


def _read(path: Path) -> dict[str, Any]:
    return weights.read_safetensors(path) if path.suffix == ".safetensors" else weights.read_pickled(path)


def _plain(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file

"""A text-to-image pipeline in diffusers' layout: what this package needs of its folder beside the transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from grafting.errors import CheckpointError, GraftError
from grafting.formats import weights
from grafting.formats.graft_folder import MANIFEST, is_graft_folder
from grafting.surgery import record_of, source_of

INDEX = "model_index.json"
MAX_TOKENS = {
    "PixArtSigmaPipeline": 300,
    "PixArtAlphaPipeline": 120,
}  # of a caption, as diffusers' pipelines have it
_SCHEDULE = {
    "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip


def find_pipeline(source: str | Path) -> Path:
    """The folder of the pipeline behind `source`: itself, the base of a graft or run folder, or a hub id's copy.

    Raises CheckpointError for anything else.
    """
    path = Path(source)
    if (path / INDEX).is_file():
        return path
    for graft in (path, path / "graft"):
        if is_graft_folder(graft):
            if (graft.parent / INDEX).is_file():  # a graft in the transformer's place of a pipeline
                return graft.parent
            manifest = weights.read_json(graft / MANIFEST, "graft")
            base = (manifest.get("base") or {}).get("source") or manifest.get("origin")
            if not isinstance(base, str):
                raise CheckpointError(
                    f"{graft}: the graft does not say which pipeline it was made from; give base="
                )
            return find_pipeline(base)
    if (path.parent / INDEX).is_file() and path.is_dir():
        return path.parent
    if path.exists() or str(source).startswith("arch:"):
        raise CheckpointError(
            f"{str(source)!r} is no text-to-image pipeline: expected a folder with {INDEX} (tokenizer, text encoder, "
            "transformer, VAE), as diffusers' save_pretrained writes it, or a graft of one"
        )
    from grafting.loading import PACKAGED, download

    if str(source) in PACKAGED:
        raise CheckpointError(
            f"{str(source)!r} ships without a text encoder; give prompts by a packaged name: "
            "emoji-train or emoji-held-out"
        )
    return find_pipeline(download(str(source), ["*.json", "*.txt", "*.model", "*.safetensors"]))


def pipeline_of(model: nn.Module) -> Path | None:
    """The folder of the pipeline that a loaded model or its base came from, if it came from one."""
    record = record_of(model)
    source = record.source if record else source_of(model)
    if not source or source.startswith("arch:"):
        return None
    try:
        return find_pipeline(source)
    except CheckpointError:
        return None


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline whose class is known here. Raises CheckpointError."""
    index = weights.read_json(folder / INDEX, "pipeline")
    if index.get("_class_name") not in MAX_TOKENS:
        raise CheckpointError(
            f"{folder / INDEX} describes a {index.get('_class_name')!r}; known are {', '.join(MAX_TOKENS)}"
        )
    return index


def component_class(index: dict[str, Any], name: str, folder: Path) -> str:
    """Class name of a component that transformers provides. Raises CheckpointError."""
    entry = index.get(name)
    if not (
        isinstance(entry, list)
        and len(entry) == 2
        and entry[0] == "transformers"
        and isinstance(entry[1], str)
    ):
        raise CheckpointError(f"{folder / INDEX}: {name} is {entry!r}; expected a class of transformers")
    return entry[1]


def vae_factor(folder: Path) -> int:
    """Pixels per latent, along a side: 1 for a pipeline without a VAE."""
    config = folder / "vae" / "config.json"
    if not config.is_file():
        return 1
    channels = weights.read_json(config, "VAE configuration").get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise CheckpointError(f"{config} does not say block_out_channels, so the size of latents is unknown")
    return 2 ** (len(channels) - 1)


def check_size(folder: Path, height: int | None, width: int | None) -> None:
    """Raise GraftError for sides in pixels that make no whole patches of the transformer; None is its own size."""
    factor, said = vae_factor(folder), None
    config, graft = folder / "transformer" / "config.json", folder / "transformer" / MANIFEST
    if config.is_file():
        said = weights.read_json(config, "transformer").get("patch_size")
    elif graft.is_file():
        said = (weights.read_json(graft, "graft").get("architecture") or {}).get("patch_size")
    patch = said if isinstance(said, int) and said > 0 else 1
    for name, side in (("height", height), ("width", width)):
        if side is None or not side % (factor * patch):
            continue
        what = (
            f"the VAE makes {factor}x{factor} pixels of a latent"
            if side % factor
            else f"{side // factor} latents do not fit patches of {patch}x{patch}"
        )
        raise GraftError(f"{name}={side}: {what}; give a multiple of {factor * patch}")


def check_schedule(folder: Path) -> None:
    """Raise CheckpointError unless the pipeline was trained on the schedule that this package noises and samples by."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(
            path.read_text(encoding="utf-8")
        )  # diffusers writes -Infinity there, which is no JSON
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {path}: {str(error)[:100]}") from None
    for key, expected in _SCHEDULE.items():
        if config.get(key, expected) != expected:
            raise CheckpointError(
                f"{path}: {key} is {config[key]!r}; this package knows {expected!r} (the linear schedule of DDPM)"
            )

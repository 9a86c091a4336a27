"""A text-to-image pipeline in diffusers' layout: what this package needs of its folder beside the transformer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from grafting.errors import CheckpointError, GraftError
from grafting.families import family_of, unwrap
from grafting.formats import weights
from grafting.formats.diffusers_folder import transformer_folder
from grafting.formats.graft_folder import MANIFEST, is_graft_folder
from grafting.surgery import pipeline_source, record_of, source_of

INDEX = "model_index.json"
SIGMA, ALPHA = "PixArtSigmaPipeline", "PixArtAlphaPipeline"
MAX_TOKENS = {SIGMA: 300, ALPHA: 120}  # of a caption, as diffusers' pipelines have it
# Hub ids that hold a transformer alone -> a pipeline with the same text encoder and VAE.
REST = dict.fromkeys(
    ("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", "PixArt-alpha/PixArt-Sigma-XL-2-2K-MS"),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
)
Part = Literal["vae", "tokenizer", "text_encoder", "scheduler"]
EVERYTHING: tuple[Part, ...] = ("vae", "tokenizer", "text_encoder", "scheduler")
_FILES: dict[Part, tuple[str, ...]] = {  # of a hub repository
    "vae": ("vae/*.json", "vae/*.safetensors", "vae/*.bin"),
    "tokenizer": ("tokenizer/*", "text_encoder/config.json"),
    "text_encoder": ("text_encoder/*.json", "text_encoder/*.safetensors"),
    "scheduler": ("scheduler/*",),
}
_GIVE = "say where the rest of the pipeline is (--pipeline, or pipeline: in a recipe)"
_CLASSES = (
    "{} makes images of classes, not of captions: there is nothing to synthesize and no pipeline to read or write; it "
    "learns from data with labels (data, --data), and is kept as a graft (--format graft, save_graft)"
)
_SCHEDULE = {
    "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip


def find_pipeline(source: str | Path, parts: Sequence[Part] = EVERYTHING) -> Path:
    """The folder of the pipeline behind `source`: itself, that of a graft or run folder, or a hub id's copy.

    A graft's pipeline is the one it stands in, the one it was told of, or its base. parts: of a hub id, what is
    fetched beside the index and the configuration of the transformer. Raises CheckpointError for anything else.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"a pipeline is read from its folder or hub id, not from a {type(source).__name__}; write one that is in "
            "memory with its save_pretrained"
        )
    try:
        return _find(source, parts)
    except CheckpointError:
        if _of_classes(source):
            raise CheckpointError(_CLASSES.format(repr(str(source)))) from None
        raise


def _of_classes(source: str | Path) -> bool:
    """Whether it is a class-conditional model; only for an error, since a file has to be loaded to tell."""
    from grafting.loading import is_here, load_model

    try:
        device = "meta" if str(source).startswith("arch:") else "cpu"
        model = load_model(source, device=device) if is_here(str(source)) else None
    except GraftError:
        return False
    return model is not None and family_of(model).num_classes(model) is not None


def _find(source: str | Path, parts: Sequence[Part]) -> Path:
    path = Path(source)
    if (path / INDEX).is_file():
        return path
    for graft in (path, path / "graft"):
        if is_graft_folder(graft):
            return _of_graft(graft, parts)
    if (path.parent / INDEX).is_file() and path.is_dir():
        return path.parent
    if transformer_folder(path):
        raise CheckpointError(
            f"{str(source)!r} holds a transformer alone, without tokenizer, text encoder and VAE; {_GIVE}"
        )
    if path.exists() or str(source).startswith("arch:"):
        raise CheckpointError(
            f"{str(source)!r} is no text-to-image pipeline: expected a folder with {INDEX} (tokenizer, text encoder, "
            f"transformer, VAE), as diffusers' save_pretrained writes it, or a graft of one; {_GIVE}"
        )
    return _from_hub(str(source), parts)


def _of_graft(graft: Path, parts: Sequence[Part]) -> Path:
    if (graft.parent / INDEX).is_file():  # in the transformer's place of a pipeline
        return graft.parent
    manifest = weights.read_json(graft / MANIFEST, "graft")
    told, base = manifest.get("pipeline"), manifest.get("base")
    source = told or (base.get("source") if isinstance(base, dict) else None) or manifest.get("origin")
    if not isinstance(source, str):
        raise CheckpointError(f"{graft}: the graft does not say which pipeline it was made from; {_GIVE}")
    return _find(source, parts)


def _from_hub(source: str, parts: Sequence[Part]) -> Path:
    from grafting.loading import PACKAGED, download

    if source in PACKAGED:
        raise CheckpointError(
            f"{source!r} ships without a text encoder; give prompts by a packaged name: "
            "emoji-train or emoji-held-out"
        )
    name = REST.get(source, source)
    folder = download(name, [INDEX, "transformer/*.json", *(file for part in parts for file in _FILES[part])])
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"the hub's {name!r} has no {INDEX}, so it is no whole pipeline; {_GIVE}")
    return folder


def home_of(model: nn.Module, parts: Sequence[Part] = EVERYTHING) -> Path:
    """The folder of the pipeline that a loaded model was told of, or that it or its base came from.

    Raises CheckpointError where there is none.
    """
    model = unwrap(model)
    record = record_of(model)
    source = pipeline_source(model) or (record.source if record else source_of(model))
    if not source and family_of(model).num_classes(model) is not None:
        raise CheckpointError(_CLASSES.format("this model"))
    if not source:
        raise CheckpointError(f"this model does not say which pipeline it is of; {_GIVE}")
    try:
        return _find(source, parts)
    except CheckpointError:
        if family_of(model).num_classes(model) is not None:
            raise CheckpointError(_CLASSES.format("this model")) from None
        raise


def transformer_config(source: str | Path) -> dict[str, Any]:
    """The configuration of the transformer that `load_model(source)` loads, without its weights; {} if unknown."""
    path = Path(source)
    for graft in (path, path / "graft", path / "transformer"):
        if is_graft_folder(graft):
            found = weights.read_json(graft / MANIFEST, "graft").get("architecture")
            return found if isinstance(found, dict) else {}
    if at := transformer_folder(path):
        return weights.read_json(at / "config.json", "transformer")
    if path.exists() or "/" not in str(source) or str(source).startswith("arch:"):
        return {}
    from grafting.loading import download

    names = ("config.json", "graft.json", "graft/graft.json")
    return transformer_config(download(str(source), [*names, *(f"transformer/{name}" for name in names[:2])]))


def fitting_class(said: str, transformer: Mapping[str, Any]) -> str:
    """The class of pipeline for a transformer of this configuration: `said` by an index, where it does not tell.

    Alpha at 1024 is given the size of the image; Sigma's configurations say that they are not, or have a scale of the
    position table or a size that Alpha never had.
    """
    side, conditions = transformer.get("sample_size"), transformer.get("use_additional_conditions")
    scale = transformer.get("interpolation_scale")
    if conditions or (conditions is None and side == 128):
        return ALPHA
    if not isinstance(side, int):
        return said
    unusual = side > 128 or (scale is not None and scale != max(side // 64, 1))
    return SIGMA if conditions is False or unusual else said


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline whose class is known here. Raises CheckpointError."""
    return check_index(weights.read_json(folder / INDEX, "pipeline"), str(folder / INDEX))


def check_index(index: dict[str, Any], where: str) -> dict[str, Any]:
    """The index as it is. Raises CheckpointError for a class of pipelines that is not known here."""
    if index.get("_class_name") not in MAX_TOKENS:
        raise CheckpointError(
            f"{where} describes a {index.get('_class_name')!r}; known are {', '.join(MAX_TOKENS)}"
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

"""`load_model`: one way in for packaged models, published files, folders, the hub, and bare architectures."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting import draws
from grafting.errors import CheckpointError, GraftError
from grafting.families import families
from grafting.formats import diffusers_folder, dit_states, weights
from grafting.formats.graft_folder import graft_in, is_graft_folder, load_graft, load_saved_model
from grafting.formats.published import load_published
from grafting.models.dit import DiT
from grafting.plugins import HOW
from grafting.surgery import record_of, set_pipeline, set_source

PACKAGED = ("dit-fashion", "pixart-emoji")
# Of a pipeline only the transformer is wanted; of a graft or a saved model, everything it has.
_HUB_FILES = [
    "config.json",
    "model_index.json",
    "model.*",
    "graft*",
    "diffusion_pytorch_model.*",
    "transformer/*",
]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_model(
    source: str | Path, *, num_heads: int | None = None, device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None, pipeline: str | Path | None = None,
) -> nn.Module:  # fmt: skip
    """Load a model, in evaluation mode.

    source: a packaged name (`dit-fashion`, `pixart-emoji`); a published `.pt` or bare `.safetensors`; a folder that
    this package saved (model, graft or run) or a DiT or PixArt in diffusers' layout (pipeline or transformer); a hub
    id of such; or `arch:DiT-XL/2`, `arch:PixArt-Sigma-2K` for random weights, the same at every call.
    A DiT of diffusers gets the published timestep frequencies, which diffusers' class shifts (docs/python.md); one
    whose blocks have different embedders is refused.
    num_heads: needed for a bare file of a width that no published size has.
    device: also "meta", for `arch:` only. dtype: of floating point, or its name; default float32, or what a graft was
    saved in. pipeline: folder or hub id of the text encoder and VAE of a transformer that stands alone; remembered with
    the model and with grafts of it.
    Raises CheckpointError or GraftError that names the source and what to do.
    """
    _check_source(source, "source")
    _check_source(pipeline, "pipeline", optional=True)
    source = str(source)
    if num_heads is not None and (
        isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1
    ):
        raise CheckpointError(f"num_heads={num_heads!r}: expected a whole number of at least 1")
    device, dtype = as_device(device), as_dtype(dtype)
    if source.startswith("arch:"):
        model = _architecture(source, device)
    elif device.type == "meta":
        raise GraftError(f"{source!r} has weights; the meta device is for arch:NAME")
    else:
        model = _load(source, num_heads)
    config: Any = model.config
    heads = config.num_heads if isinstance(model, DiT) else getattr(config, "num_attention_heads", None)
    if num_heads is not None and heads is not None and heads != num_heads:
        raise CheckpointError(f"{source!r} has {heads} heads, not num_heads={num_heads}; leave num_heads out")
    if record_of(model) is None:
        set_source(model, source if not Path(source).exists() else str(Path(source).resolve()))
    if pipeline is not None:
        set_pipeline(model, str(pipeline))
    model = model.to(device).eval()
    return weights.cast(model, dtype) if dtype else model


def _check_source(source: object, what: str, *, optional: bool = False) -> None:
    if isinstance(source, (str, os.PathLike)) or (optional and source is None):
        return
    remedy = "give the name, file, folder or hub id of a model"
    if isinstance(source, nn.Module):
        remedy = "it is a model already, to be used as it is"
    elif isinstance(getattr(source, "transformer", None), nn.Module):
        remedy = "use its .transformer, which is a model already, or give the folder of its save_pretrained"
    raise CheckpointError(f"load_model: {what} is a {type(source).__name__}; {remedy}")


def _architecture(source: str, device: torch.device) -> nn.Module:
    """Random weights of a named architecture, the same at every call: a graft of it finds its base again."""
    name = source.removeprefix("arch:")
    for family in families().values():
        architecture = family.named(name)
        if architecture is not None:
            with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
                torch.manual_seed(draws.torch_seed(0, source))
                return family.build(architecture).eval()
    known = "; ".join(family.names for family in families().values())
    raise GraftError(
        f"unknown architecture {name!r}: expected {known}, such as DiT-XL/2 or PixArt-Sigma-2K; "
        f"for one of another family, {HOW}"
    )


def packaged_folder(name: str) -> Path:
    """Folder of a packaged model."""
    return Path(str(files("grafting") / "assets" / name))


def _load(source: str, num_heads: int | None) -> nn.Module:
    if source in PACKAGED:
        return _load_folder(packaged_folder(source))
    path = Path(source)
    if path.is_file():
        return load_published(path, num_heads=num_heads)
    if path.is_dir():
        return _load_folder(path)
    if _HUB_ID.fullmatch(source) and not path.suffix:
        return _load_folder(download(source, _HUB_FILES))
    raise CheckpointError(
        f"can't load {source!r}: no such file or folder; expected a packaged name ({', '.join(PACKAGED)}), a .pt file, "
        "a folder, a hub id such as facebook/DiT-XL-2-256, or arch:DiT-XL/2"
    )


def _load_folder(folder: Path) -> nn.Module:
    if is_graft_folder(graft_in(folder)):  # itself, a run's, or a saved pipeline's
        return load_graft(folder)
    if (folder / "model.json").is_file():
        return load_saved_model(folder)
    if transformer := diffusers_folder.transformer_folder(folder):
        return diffusers_folder.read_transformer(transformer)
    raise CheckpointError(
        f"the folder {str(folder)!r} is no graft, run, saved model, or diffusers model: "
        "expected graft.json, graft/, model.json, config.json or transformer/config.json in it"
    )


def is_here(source: str) -> bool:
    """Whether `load_model(source)` would find its weights without asking the network."""
    if source.startswith("arch:") or source in PACKAGED or Path(source).exists():
        return True
    if not _HUB_ID.fullmatch(source):
        return False
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(source, allow_patterns=_HUB_FILES, local_files_only=True)
    except Exception:
        return False
    return True


def save_diffusers(model: nn.Module, folder: str | Path) -> None:
    """Save an unedited DiT in diffusers' layout; `load_model` reads it back exactly."""
    if not isinstance(model, DiT) or record_of(model) is not None:
        raise CheckpointError(
            "only an unedited DiT fits diffusers' DiTTransformer2DModel; use save_graft (--format graft)"
        )
    folder = Path(folder)
    weights.write_safetensors(
        folder / "diffusion_pytorch_model.safetensors",
        dit_states.to_diffusers(model.state_dict()),
        {"format": "pt"},
    )
    weights.write_json(
        folder / "config.json",
        {"_class_name": "DiTTransformer2DModel", **dit_states.diffusers_config(model.config)},
    )


def download(name: str, patterns: list[str]) -> Path:
    """The files of a hub repository whose names match, on disk. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"can't get {name!r} from the hub, and there is no such file or folder: {reason[:160]}"
        ) from None


def as_device(device: str | torch.device) -> torch.device:
    """A torch device by name. Raises GraftError for one that PyTorch does not know, or that is not here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise GraftError(f"unknown device {device!r}: expected cpu, cuda, cuda:1, mps or meta") from None
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraftError(f"can't compute on device {str(found)!r} here: {reason}") from None
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type of weights by itself or its name; None stays None. Raises GraftError for what weights can't have."""
    known = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in known:
        names = ", ".join(str(one).removeprefix("torch.") for one in known)
        raise GraftError(f"unknown dtype {str(dtype)!r}: expected one of {names}")
    return found


def pretraining_visits(model: nn.Module) -> float | None:
    """How many images the base of `model` saw in its pretraining, where that is known: 3 FLOPs passes each."""
    from grafting.surgery import source_of

    source = source_of(model)
    if source in PACKAGED:
        folder = packaged_folder(source)
        if (folder / "model.json").is_file():
            found = weights.read_json(folder / "model.json", "model").get("pretraining", {})
        else:
            found = weights.read_json(folder / "pretraining.json", "pretraining")
        return float(found.get("image_visits", 0)) or None
    return None

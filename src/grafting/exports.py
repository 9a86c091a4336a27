"""`graft export`: a model in another layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from grafting.errors import GraftError
from grafting.formats.graft_folder import save_graft
from grafting.formats.published import export_published
from grafting.loading import load_model, save_diffusers
from grafting.lora import lora_of, merge_lora
from grafting.pipelines import save_pipeline

FORMATS = ("published", "diffusers", "pipeline", "graft")


def export_model(
    source: str, out: str | Path, format: str, *, merge: bool = False, dtype: torch.dtype | None = None,
    pipeline: str | None = None,
) -> None:  # fmt: skip
    """Write the model of `source` (what `load_model` takes) to `out`.

    format: published (a `.pt`), diffusers (an unedited DiT), pipeline (`save_pipeline`), graft (`save_graft`).
    merge: add LoRA adapters into the weights that they sit on first. pipeline: where the rest of the pipeline of
    a transformer is. Raises GraftError.
    """
    if format not in FORMATS:
        raise GraftError(f"unknown format {format!r}: expected {' or '.join(FORMATS)}")
    if pipeline is not None and format not in ("pipeline", "graft"):
        raise GraftError(f"the format {format!r} has no place for a pipeline; leave --pipeline out")
    model = load_model(source, dtype=dtype, pipeline=pipeline)
    if merge and lora_of(model) is None:
        raise GraftError(f"{source!r} has no LoRA adapters to merge; leave --merge out")
    if merge:
        model = merge_lora(model)
    if lora_of(model) is not None and format in ("published", "diffusers"):
        raise GraftError(
            f"{source!r} has LoRA adapters, which the format {format!r} has no place for; give --merge"
        )
    run = source if (Path(source) / "run.json").is_file() else None

    def whole(model: nn.Module, folder: Path) -> None:
        save_pipeline(model, folder, run=run)

    writers: dict[str, Callable[[nn.Module, Path], None]] = {
        "published": export_published, "diffusers": save_diffusers, "pipeline": whole, "graft": save_graft,
    }  # fmt: skip
    writers[format](model, Path(out))

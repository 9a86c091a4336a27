"""Edited text-to-image models back in diffusers: pipelines with the edited transformer, their folders, the hub."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting.errors import CheckpointError, GraftError
from grafting.formats import weights
from grafting.formats.graft_folder import MANIFEST, is_graft_folder, save_graft
from grafting.formats.pipeline_folder import INDEX, find_pipeline, read_index
from grafting.lora import merge_lora
from grafting.plan import GraftPlan
from grafting.surgery import record_of, set_record


def load_pipeline(
    folder: str | Path, base: str | Path | None = None, *, device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """diffusers' pipeline with the edited transformer of a graft, run or `save_pipeline` folder.

    base: the pipeline that was edited, for its tokenizer, text encoder, VAE and scheduler; default: the graft's own.
    A pipeline that was not edited loads too. Raises CheckpointError.
    """
    import diffusers

    from grafting.loading import load_model

    home = find_pipeline(base or folder)
    index = read_index(home)
    transformer = load_model(folder, device=device, dtype=dtype).eval()
    given = {"torch_dtype": dtype} if dtype else {}
    try:
        pipeline: Any = getattr(diffusers, index["_class_name"]).from_pretrained(
            str(home), transformer=transformer, **given
        )
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"can't load the pipeline {str(home)!r}: {reason[:200]}") from None
    return pipeline.to(device)


def save_pipeline(model: nn.Module, folder: str | Path, *, merge: bool = False) -> None:
    """Write a whole pipeline with this edited transformer, which needs no base; `load_pipeline` opens it.

    The transformer's folder holds a graft and no config.json, so that diffusers' own loaders refuse it instead of
    filling what they don't know with garbage. merge: add LoRA adapters into the weights first.
    Raises CheckpointError.
    """
    record, folder = record_of(model), Path(folder)
    if record is None or not record.source:
        raise CheckpointError(
            "only an edited model that came from a pipeline can be saved as one; use save_model"
        )
    home = find_pipeline(record.source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{str(folder)!r} is not an empty folder; give another place")
    alone = copy.copy(merge_lora(model) if merge else model)
    set_record(alone, dataclasses.replace(record, base_digests={}))
    save_graft(alone, folder / "transformer")
    for part in sorted(home.iterdir()):
        if part.is_dir() and part.name != "transformer" and not part.name.startswith("."):
            shutil.copytree(part, folder / part.name)
    weights.write_json(folder / INDEX, {**read_index(home), "_opened_by": "grafting.load_pipeline"})
    weights.write_bytes(folder / "README.md", model_card(folder).encode())


def model_card(folder: str | Path) -> str:
    """A model card (Markdown) of a graft or pipeline folder: what opens it, the plan, the base."""
    folder = Path(folder)
    places = (folder, folder / "transformer", folder / "graft")
    graft = next((at for at in places if is_graft_folder(at)), None)
    if graft is None:
        raise CheckpointError(f"{str(folder)!r} holds no graft: it has no {MANIFEST}")
    manifest = weights.read_json(graft / MANIFEST, "graft")
    plan = GraftPlan.from_dict(manifest["plan"], allow_empty=True)
    origin = manifest.get("origin") or "not recorded"
    source = Path(origin).name if Path(origin).is_absolute() else origin
    lora = manifest.get("lora")
    lines = [
        "---", "library_name: grafting", "tags: [grafting, diffusion]", "---", "", f"# A graft of {source}", "",
        "The architecture of this model was edited, so that diffusers' own classes can't load it. Open it with", "",
        "```python", "import grafting", "", 'pipeline = grafting.load_pipeline("FOLDER")', "```", "",
        "## Plan", "", "```json", json.dumps(plan.to_dict()["entries"], indent=1), "```", "",
        f"Base needed beside this folder: {'yes' if manifest['base'] else 'no'}.",
        f"LoRA: rank {lora['rank']}, alpha {lora['alpha']:g}, unmerged." if lora else "LoRA: none.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False, api: Any = None) -> str:
    """Upload a graft or pipeline folder with its model card; the address of the repository.

    api: a `huggingface_hub.HfApi`, default a new one (which takes the token of `hf auth login`). Raises GraftError.
    """
    folder = Path(folder)
    if not (folder / "README.md").is_file():
        weights.write_bytes(folder / "README.md", model_card(folder).encode())
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraftError(f"can't upload to {repo!r}: {reason[:200]}") from None
    return f"https://huggingface.co/{repo}"

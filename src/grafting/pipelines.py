"""Edited text-to-image models back in diffusers: pipelines with the edited transformer, their folders, the hub."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting.card import model_card, write_samples
from grafting.errors import CheckpointError, GraftError
from grafting.families import family_of
from grafting.formats import weights
from grafting.formats.diffusers_folder import variant_of
from grafting.formats.graft_folder import MANIFEST, is_graft_folder, save_graft
from grafting.formats.pipeline_folder import (
    INDEX,
    check_index,
    find_pipeline,
    fitting_class,
    home_of,
    read_index,
)
from grafting.lora import merge_lora
from grafting.surgery import record_of, set_record


def load_pipeline(
    folder: str | Path, base: str | Path | None = None, *, device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """diffusers' pipeline with the edited transformer of a graft, run or `save_pipeline` folder.

    base: the pipeline whose tokenizer, text encoder, VAE and scheduler are taken; default: the graft's own. A pipeline
    that was not edited loads too, and a transformer alone with `base`. The class is the one that fits the transformer,
    whatever the pipeline's index says. Raises CheckpointError.
    """
    import diffusers

    from grafting.loading import load_model

    home = find_pipeline(base or folder)
    index = read_index(home)
    transformer = load_model(folder, device=device, dtype=dtype).eval()
    given: dict[str, Any] = {"torch_dtype": dtype} if dtype else {}
    if "fp16" in map(variant_of, (home / "text_encoder", home / "vae")):  # plain weights are there or not
        given |= {"variant": "fp16", "torch_dtype": dtype or torch.float32}
    kind = fitting_class(index["_class_name"], family_of(transformer).architecture(transformer))
    try:
        with warnings.catch_warnings():  # newer versions want `dtype`, older ones don't know it
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipeline: Any = getattr(diffusers, kind).from_pretrained(
                str(home), transformer=transformer, **given
            )
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"can't load the pipeline {str(home)!r}: {reason[:200]}") from None
    return pipeline.to(device)


def save_pipeline(
    model: nn.Module, folder: str | Path, *, merge: bool = False, run: str | Path | None = None,
    pipeline: Any = None,
) -> None:  # fmt: skip
    """Write a whole pipeline with this edited transformer, which needs no base; `load_pipeline` opens it.

    The transformer's folder holds a graft and no config.json, so that diffusers' own loaders refuse it instead of
    filling what they don't know with garbage. merge: add LoRA adapters into the weights first. run: the run folder that
    the model came from: the model card then has its protocol, costs and samples. pipeline: the rest of the
    pipeline: its folder or hub id, or diffusers' object itself, whose parts are written as they are in memory; default:
    where the model was told of, or came from. Raises CheckpointError.
    """
    record, folder = record_of(model), Path(folder)
    if record is None:
        inside = getattr(model, "transformer", None)
        if isinstance(inside, nn.Module) and record_of(inside) is not None:
            raise CheckpointError(
                "save_pipeline takes the edited transformer, not the pipeline around it: give its .transformer"
            )
        raise CheckpointError(
            "save_pipeline is for what graft() or load_graft() returned, and this model has no plan; use save_model, "
            "or diffusers' own save_pretrained"
        )
    if family_of(model).num_classes(model) is not None:
        raise CheckpointError(
            "this model makes images of classes, not of captions: there is no pipeline to write; write a graft "
            "(--format graft, save_graft)"
        )
    if not (record.source or record.pipeline or pipeline is not None):
        raise CheckpointError(
            "this model does not say which pipeline it is of, since load_model did not load its base; give pipeline=: "
            "the pipeline, or the folder or hub id of the unedited one"
        )
    home: Path | dict[str, Any]
    if isinstance(getattr(pipeline, "components", None), dict):
        home, index = pipeline.components, check_index(json.loads(pipeline.to_json_string()), "the pipeline")
        index.pop("_name_or_path", None)  # where it was loaded from
    else:
        home = find_pipeline(pipeline) if pipeline is not None else home_of(model)
        index = read_index(home)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{str(folder)!r} is not an empty folder; give another place")
    alone = copy.copy(merge_lora(model) if merge else model)
    hub_id = (
        None if not record.source or Path(record.source).exists() else record.source
    )  # a folder of this machine is nobody else's
    set_record(alone, dataclasses.replace(record, base_digests={}, source=hub_id, pipeline=None))
    save_graft(alone, folder / "transformer")
    _write_rest(home, folder)
    index["_class_name"] = fitting_class(index["_class_name"], record.architecture)
    weights.write_json(folder / INDEX, {**index, "_opened_by": "grafting.load_pipeline"})
    if run is not None:
        write_samples(Path(run), folder)
    weights.write_bytes(folder / "README.md", model_card(folder, run).encode())


def _write_rest(home: Path | dict[str, Any], folder: Path) -> None:
    """All parts but the transformer: copied from a folder, or as diffusers and transformers write those in memory."""
    if isinstance(home, dict):
        for name, part in home.items():
            if name == "transformer" or part is None:
                continue
            try:
                part.save_pretrained(folder / name)
            except Exception as error:  # of other packages' code
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise CheckpointError(
                    f"can't write the {name} of the pipeline: {reason[:200]}; delete {str(folder)!r}, and give the "
                    "pipeline by its folder or hub id"
                ) from None
            if (config := folder / name / "config.json").is_file():  # says where it was loaded from
                said = weights.read_json(config, "configuration")
                weights.write_json(config, {key: said[key] for key in said if key != "_name_or_path"})
        return
    for part in sorted(home.iterdir()):
        if part.is_dir() and part.name != "transformer" and not part.name.startswith("."):
            shutil.copytree(part, folder / part.name)


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False, api: Any = None) -> str:
    """Upload a graft or pipeline folder with its model card (README.md, written where there is none).

    Returns the address of the repository. A graft whose base is a local folder is refused: nobody else has that.

    api: a `huggingface_hub.HfApi`, default a new one (which takes the token of `hf auth login`). Raises GraftError.
    """
    folder = Path(folder)
    if (folder / "run.json").is_file():
        raise GraftError(
            f"{str(folder)!r} is a run folder, with checkpoints and logs; upload what graft export makes of it "
            "(--format pipeline, or --format graft)"
        )
    if is_graft_folder(folder):
        manifest = weights.read_json(folder / MANIFEST, "graft")
        base, rest = manifest.get("base"), manifest.get("pipeline")
        needed = [base.get("source") or "/"] if isinstance(base, dict) else []
        if any(Path(where).is_absolute() for where in [*needed, *([rest] if isinstance(rest, str) else [])]):
            raise GraftError(
                f"the graft {str(folder)!r} needs its base, which is a local folder, or its pipeline is one; upload "
                "the whole instead (graft export --format pipeline), or graft the model by its hub id"
            )
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

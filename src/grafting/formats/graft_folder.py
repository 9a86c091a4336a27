"""A graft on disk: `graft.json` (plan, base, what registers its operators) and `graft-<hash>.safetensors`.

Only the tensors that differ from the base are stored; where nearly all differ (full finetuning, an import) the graft is
self-contained and names no base.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting import operators
from grafting.errors import CheckpointError, GraftError
from grafting.families import families, family_of, unwrap
from grafting.formats import limits, weights
from grafting.lora import Lora, add_lora, lora_of, module_state, plain_name, plain_state
from grafting.operators.registry import is_of_a_script
from grafting.plan import GraftPlan
from grafting.plugins import HOW
from grafting.surgery import GraftRecord, graft, pipeline_source, record_of, set_record

FORMAT, VERSION = "grafting", 1
MANIFEST = "graft.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
SELF_CONTAINED_FROM = 0.9  # share of the base's parameters that differ


def save_graft(model: nn.Module, folder: str | Path) -> None:
    """Save an edited model to `folder`: the plan, the tensors that differ from its base, and the base's name and hash.

    Raises CheckpointError for a model that was not edited or that its plan would not give again (modules exchanged by
    hand, adapters that finetune did not add), and where the folder can't be written. Warns of an operator that only
    this script or notebook defines.
    """
    folder, model = Path(folder), unwrap(model)
    record = record_of(model)
    if record is None:
        raise CheckpointError(
            "this model has no plan: save_graft saves what graft() or load_graft() returned"
        )
    state, lora = plain_state(model), lora_of(model)
    now = {plain_name(name): digest for name, digest in weights.digests(model).items()}
    if not now:
        raise CheckpointError("this model is on the meta device and has no values to save")
    _check_loadable(record, state, lora)
    family = family_of(model)
    base_names = {name: family.teacher_name(model, name) for name in state}
    changed = {name for name, digest in now.items() if record.base_digests.get(base_names[name]) != digest}
    shared = {name: state[name].numel() for name in state if base_names[name] in record.base_digests}
    total, kept = sum(shared.values()), sum(size for name, size in shared.items() if name not in changed)
    self_contained = not record.base_digests or kept < (1 - SELF_CONTAINED_FROM) * total
    tensors = {name: tensor for name, tensor in state.items() if self_contained or name in changed}
    used = sorted({entry.operator for entry in record.plan.sites.values()})
    packages = {name: operators.get(name).package for name in used}
    if of_a_script := [name for name, package in packages.items() if is_of_a_script(package)]:
        warnings.warn(
            f"{folder}: operator {', '.join(map(repr, of_a_script))} is defined in a script or notebook, so nothing "
            "else can load this graft without that definition: move it into a module of its own, import that, and save",
            stacklevel=2,
        )
    sha256 = weights.combined_digest({name: now[name] for name in tensors})
    file = f"graft-{sha256[:12]}.safetensors"  # named by content: the manifest never points at other tensors
    weights.write_safetensors(folder / file, tensors)
    weights.write_json(folder / MANIFEST, {
        "format": FORMAT,
        "version": VERSION,
        "plan": record.plan.to_dict(),
        "seed": record.seed,
        "operators": packages,
        "architecture": record.architecture,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "origin": record.source,  # of the rest of a pipeline, also where the weights need no base
        **({"pipeline": record.pipeline} if record.pipeline else {}),  # of that rest, where it is not at the origin
        "base": None if self_contained else {"source": record.source, "sha256": record.base_hash},
        **({"lora": lora.to_dict()} if lora else {}),
        "tensors": {"file": file, "sha256": sha256},
    })  # fmt: skip
    for stale in folder.glob("graft-*.safetensors"):
        if stale.name != file:
            stale.unlink(missing_ok=True)


def _check_loadable(record: GraftRecord, state: dict[str, torch.Tensor], lora: Lora | None) -> None:
    """Raise CheckpointError unless the plan makes tensors of these names and shapes, as `load_graft` will do."""
    manifest: dict[str, Any] = {"seed": record.seed, **({"lora": lora.to_dict()} if lora else {})}
    with torch.device("meta"):
        planned = plain_state(_edited(_build(record.architecture), record.plan, manifest))
    try:
        weights.check_fit(planned, state, "save_graft: the plan of this model makes another one")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; nothing could load it: undo what was exchanged or added by hand (PEFT's adapters: "
            "merge_and_unload() first, or train them with finetune's lora:), or graft the base by another plan"
        ) from None


def is_graft_folder(folder: Path) -> bool:
    """Whether `folder` is what `save_graft` writes."""
    return (folder / MANIFEST).is_file()


def graft_in(folder: str | Path) -> Path:
    """The graft of a folder: itself, or that of a run (`graft/`) or a saved pipeline (`transformer/`) around it."""
    places = (Path(folder) / inner for inner in ("", "graft", "transformer"))
    return next((place for place in places if is_graft_folder(place)), Path(folder))


def load_graft(
    folder: str | Path, base: nn.Module | str | os.PathLike[str] | None = None, *, device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None, share: bool = False,
) -> nn.Module:  # fmt: skip
    """The edited model saved in `folder`, in evaluation mode.

    folder: what `save_graft` wrote, or a run folder or saved pipeline around it.
    base: the model that was edited, or where to load it from; default: where it was loaded from at the time. It
    must be that very model: its hash is compared. A self-contained graft needs none.
    share: the weights that the graft left as they were are those of `base` itself, not copies, where none was changed.
    Raises CheckpointError.
    """
    from grafting.loading import as_device, as_dtype, load_model

    folder, device, dtype = graft_in(folder), as_device(device), as_dtype(dtype)
    manifest = _read_manifest(folder)
    plan = GraftPlan.from_dict(manifest["plan"], allow_empty=True)
    for name, package in manifest["operators"].items():
        operators.get(name, package=package)
    file = folder / f"graft-{manifest['tensors']['sha256'][:12]}.safetensors"
    tensors = weights.read_safetensors(file)
    found = weights.combined_digest({name: weights.tensor_digest(tensor) for name, tensor in tensors.items()})
    if found != manifest["tensors"]["sha256"]:
        raise CheckpointError(
            f"{file} is damaged: its hash is not the one in {MANIFEST}; copy the graft again"
        )

    pipeline = None if _stands_in_pipeline(folder) else manifest.get("pipeline")
    reference, saved_dtype = manifest["base"], _DTYPES[manifest["dtype"]]
    if reference is None:
        limits.check_architecture(manifest["architecture"], len(tensors))
        with torch.device("meta"):  # nothing is allocated for a model that its tensors do not fit
            shapes = plain_state(_edited(_build(manifest["architecture"]), plan, manifest))
        weights.check_fit(shapes, tensors, str(folder))
        skeleton = weights.cast(_build(manifest["architecture"]), saved_dtype)
        student, digests, source = _edited(skeleton, plan, manifest), {}, _origin(manifest, folder)
        weights.load_strictly(student, module_state(student, tensors), str(folder))
    else:
        if base is None:
            if not reference["source"]:
                raise CheckpointError(
                    f"{folder}: the graft does not say where its base came from; give the model that was edited: "
                    "grafting.load_graft(folder, base=model)"
                )
            base = reference["source"]
        if isinstance(base, (str, os.PathLike)):
            heads, source = manifest["architecture"].get("num_heads"), os.fspath(base)
            base = load_model(source, num_heads=heads, dtype=saved_dtype)
        elif isinstance(base, nn.Module):
            base, source = unwrap(base), reference["source"]
        else:
            raise CheckpointError(
                f"base: got {type(base).__name__}; expected the model that was edited, or where to load it from"
            )
        base, pipeline = _sized(base, manifest["architecture"]), pipeline_source(base) or pipeline
        digests = weights.digests(base)
        if weights.combined_digest(digests) != reference["sha256"]:
            raise CheckpointError(
                f"{folder}: this graft was made on another base (sha256 {str(reference['sha256'])[:12]}..., "
                f"source {reference['source']!r}); give that model as base="
            )
        student = _edited(base, plan, manifest, share=share and not any(name in digests for name in tensors))
        own = plain_state(student)
        family, given = family_of(student), base.state_dict()
        base_names = {name: family.teacher_name(student, name) for name in own}
        same = {name: given[base_name] for name, base_name in base_names.items()
                if base_name in given and own[name].shape == given[base_name].shape}  # fmt: skip
        weights.load_strictly(student, module_state(student, {**own, **same, **tensors}), str(folder))
    set_record(student, GraftRecord(
        plan=plan, seed=manifest["seed"], source=source, architecture=manifest["architecture"], base_digests=digests,
        pipeline=pipeline if isinstance(pipeline, str) else None,
    ))  # fmt: skip
    student = student.to(device).eval()
    return weights.cast(student, dtype) if dtype else student


def _edited(base: nn.Module, plan: GraftPlan, manifest: dict[str, Any], share: bool = False) -> nn.Module:
    """The base under the plan, with the adapters of the manifest; their values are still to be loaded."""
    student = graft(base, plan, seed=manifest["seed"], share=share) if len(plan) else base
    if "lora" in manifest:
        student = student if len(plan) else copy.deepcopy(student)
        add_lora(student, Lora.from_dict(manifest["lora"], MANIFEST))
    return student


def _origin(manifest: dict[str, Any], folder: Path) -> str | None:
    """Where the rest of a pipeline is: around the graft, or where the base came from."""
    if _stands_in_pipeline(folder):
        return str(folder.parent.resolve())
    origin = manifest.get("origin")
    return origin if isinstance(origin, str) else None


def _stands_in_pipeline(folder: Path) -> bool:
    """Whether the graft is in the transformer's place of a whole pipeline."""
    return (folder.parent / "model_index.json").is_file()


def _sized(base: nn.Module, architecture: dict[str, Any]) -> nn.Module:
    """The base at the size of samples that was grafted, for families that take several."""
    size = architecture.get("latent_size")
    return family_of(base).resized(base, *map(int, size)) if size else base


def _build(architecture: dict[str, Any]) -> nn.Module:
    name = architecture.get("family")
    family = families().get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(
            f"unknown model family {str(name)[:60]!r}: known are {', '.join(families())}; for another, {HOW}"
        )
    return family.build(architecture)


def plan_of_graft(folder: str | Path) -> GraftPlan:
    """The plan of a saved graft; empty for an imported self-graft. Raises CheckpointError, PlanError."""
    return GraftPlan.from_dict(_read_manifest(graft_in(folder))["plan"], allow_empty=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} is not a graft: it has no {MANIFEST}, nor a run's graft/{MANIFEST} or a pipeline's "
            f"transformer/{MANIFEST}"
        )
    manifest = weights.read_json(path, "graft")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this version reads format {FORMAT!r} version {VERSION}"
        )
    shapes: dict[str, type | tuple[type, ...]] = {
        "plan": dict, "seed": int, "operators": dict, "architecture": dict, "dtype": str,
        "base": (dict, type(None)), "tensors": dict,
    }  # fmt: skip
    for key, kind in shapes.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise CheckpointError(f"{path}: key {key!r} is missing or not of the right kind")
    sha256 = manifest["tensors"].get("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):  # it is part of a file's name
        raise CheckpointError(f"{path}: key 'tensors' has no hash")
    if manifest["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{path}: dtype {str(manifest['dtype'])[:40]!r} is not one of {', '.join(_DTYPES)}"
        )
    base = manifest["base"]
    if base is not None and not (
        isinstance(base.get("sha256"), str) and isinstance(base.get("source"), (str, type(None)))
    ):
        raise CheckpointError(f"{path}: key 'base' needs a hash and a source")
    if not all(isinstance(v, str) for v in manifest["operators"].values()):
        raise CheckpointError(f"{path}: key 'operators' maps names to modules")
    return manifest


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Save an unedited model of our own families: `model.json` (architecture) and `model.safetensors`."""
    folder, model = Path(folder), unwrap(model)
    if record_of(model) is not None:
        raise GraftError("this model was edited: save it with save_graft")
    state = model.state_dict()
    weights.write_safetensors(folder / "model.safetensors", state)
    weights.write_json(folder / "model.json", {
        "format": FORMAT, "version": VERSION, "architecture": family_of(model).architecture(model),
    })  # fmt: skip


def load_saved_model(folder: Path) -> nn.Module:
    """The inverse of `save_model`; a position table that is not stored is the fixed one."""
    manifest = weights.read_json(folder / "model.json", "model")
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("architecture"), dict):
        raise CheckpointError(f"{folder / 'model.json'} does not describe a model of this package")
    tensors = weights.read_safetensors(folder / "model.safetensors")
    limits.check_architecture(manifest["architecture"], len(tensors))
    with torch.device("meta"):  # nothing is allocated for a model that its tensors do not fit
        shapes = _build(manifest["architecture"]).state_dict()
    needed = {name: shape for name, shape in shapes.items() if name != "pos_embed" or name in tensors}
    weights.check_fit(needed, tensors, str(folder))
    model = _build(manifest["architecture"])
    own = model.state_dict()
    if "pos_embed" in own:
        tensors.setdefault("pos_embed", own["pos_embed"])
    if all(tensor.dtype == torch.float16 for name, tensor in tensors.items() if name != "pos_embed"):
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    weights.load_strictly(model, tensors, str(folder))
    return model

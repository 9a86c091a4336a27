"""Surgery: match a plan against a model, check everything, and only then edit a copy.

The edited model carries a `GraftRecord`, so that it can say what was done to it and be saved as small as possible.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from grafting import draws, operators
from grafting.depth import depth_edits, meta_copy, open_groups, rearrange
from grafting.errors import CheckpointError, GraftError, PlanError
from grafting.explanation import Edit, Explanation
from grafting.families import Family, Site, family_of, unwrap
from grafting.formats.weights import combined_digest, digests
from grafting.operators import Cost
from grafting.plan import GraftPlan, Parallelize, PlanLike, Replace
from grafting.selectors import Locality

_RECORD = "graft_record"
_SOURCE = "graft_source"
_PIPELINE = "graft_pipeline"


@dataclass(frozen=True, kw_only=True)
class GraftRecord:
    """What was done to a model: the plan with layer numbers, and the base it was done to."""

    plan: GraftPlan
    seed: int
    source: str | None  # what load_model was given for the base, if it came from there
    architecture: dict[str, Any]  # of the base, see Family.build
    base_digests: dict[str, str] = field(repr=False)  # of the base's tensors; empty on the meta device
    pipeline: str | None = None  # where the rest of the base's pipeline is, if not at `source`

    @property
    def base_hash(self) -> str | None:
        """SHA-256 of the whole base."""
        return combined_digest(self.base_digests) if self.base_digests else None


def record_of(model: nn.Module) -> GraftRecord | None:
    """The record of an edited model, or None for one that was not edited."""
    record = getattr(unwrap(model), _RECORD, None)
    return record if isinstance(record, GraftRecord) else None


def set_record(model: nn.Module, record: GraftRecord) -> None:
    """Attach a record to an edited model (for loaders); diffusers' `save_pretrained` refuses it from now on."""
    object.__setattr__(model, _RECORD, record)
    if hasattr(model, "save_pretrained"):
        object.__setattr__(model, "save_pretrained", _refuse_to_save)


def _refuse_to_save(*given: Any, **options: Any) -> None:
    """What an edited model has in the place of diffusers' `save_pretrained`; copies and pickles of it have it, too."""
    raise CheckpointError(
        "save_pretrained of an edited model: diffusers' class could not load what it writes, since it would build the "
        "operators that were replaced; use grafting.save_pipeline(model, folder), which writes the whole pipeline, or "
        "grafting.save_graft(model, folder); the folder of a pipeline that was to be saved may hold its other parts by "
        "now: it is incomplete and can be deleted"
    )


def source_of(model: nn.Module) -> str | None:
    """What `load_model` was given for this model."""
    return getattr(model, _SOURCE, None)


def set_source(model: nn.Module, source: str) -> None:
    """Remember where a model came from (for loaders)."""
    object.__setattr__(model, _SOURCE, source)


def pipeline_source(model: nn.Module) -> str | None:
    """Folder or hub id of the rest of a transformer's pipeline, where `load_model` or a graft was told of one."""
    record = record_of(model)
    return record.pipeline if record else getattr(model, _PIPELINE, None)


def set_pipeline(model: nn.Module, pipeline: str) -> None:
    """Remember where the rest of a transformer's pipeline is; grafts of the model remember it, too."""
    where = str(Path(pipeline).resolve()) if Path(pipeline).exists() else str(pipeline)
    if (record := record_of(model)) is not None:
        set_record(model, replace(record, pipeline=where))
    else:
        object.__setattr__(model, _PIPELINE, where)


def operator_name(module: nn.Module) -> str:
    """The registered name of an operator, or its class for one that the host brought along."""
    return getattr(module, "operator_name", None) or type(module).__name__


def edited_sites(model: nn.Module) -> dict[str, tuple[Site, Replace]]:
    """path -> (site, entry) of every operator that a plan put into this model."""
    record = record_of(model)
    if record is None:
        return {}
    wanted = record.plan.sites
    sites = family_of(model).sites(model)
    return {
        site.path: (site, wanted[site.kind, site.layer])
        for site in sites
        if (site.kind, site.layer) in wanted
    }


def edited_groups(model: nn.Module) -> dict[str, tuple[Site, Parallelize]]:
    """path -> (site, entry) of every group of blocks that a plan put side by side in this model."""
    record = record_of(model)
    if record is None:
        return {}
    entries = record.plan.group_entries
    return {site.path: (site, entries[site.layers]) for site in family_of(model).group_sites(model)}


def match(
    model: nn.Module, plan: PlanLike, locality: Locality | None = None
) -> tuple[GraftPlan, tuple[Edit, ...]]:
    """Resolve and check a plan on an untouched model: the plan with layer numbers, and its edits in block order.

    Raises PlanError or OperatorError that names the layer and the remedy.
    """
    plan = GraftPlan.of(plan)
    family = family_of(model)
    resolved = plan.resolve(family.num_layers(model), locality)
    sites = {(site.kind, site.layer): site for site in family.sites(model)}
    kinds = sorted({kind for kind, _ in sites})
    earlier = record_of(model)
    edits = []
    for number, entry in enumerate(resolved, 1):
        if not isinstance(entry, Replace):
            continue
        where = f"entry {number} ({entry.target} -> {entry.operator})"
        if entry.target not in kinds:
            raise PlanError(
                f"{where}: the family '{family.name}' has no target {entry.target!r}; it has {', '.join(kinds)}"
            )
        known = operators.get(entry.operator)
        if entry.target not in known.targets:
            raise PlanError(
                f"{where}: operator '{entry.operator}' takes the place of {' or '.join(known.targets)}, "
                f"not of {entry.target}; change target or operator"
            )
        for layer in entry.layers:
            if (entry.target, layer) not in sites:
                raise PlanError(
                    f"{where}: layer {layer} was pruned in an earlier graft; edit the base with one plan instead"
                )
            site = sites[entry.target, layer]
            if earlier is not None and (entry.target, layer) in earlier.plan.sites:
                raise PlanError(
                    f"{where}: {site} was replaced by '{site.operator}' in an earlier graft; "
                    "edit the base with one plan instead"
                )
            edits.append(Edit(
                site=site, entry=entry, after=_check_operator(site, entry),
                before=site.cost,
            ))  # fmt: skip
    _everything(earlier, resolved, family.num_layers(model))
    return resolved, tuple(sorted(edits, key=lambda edit: (edit.site.layer, edit.site.kind)))


def explain(model: nn.Module, plan: PlanLike, locality: Locality | None = None) -> Explanation:
    """What `plan` would do to `model`, with parameters and FLOPs before and after; touches nothing."""
    resolved, edits = match(model, plan, locality)
    family = family_of(model)
    params, flops = sum(p.numel() for p in model.parameters()), family.flops_per_image(model)
    num_layers, depth = family.num_layers(model), len(family.block_paths(model))
    said = Explanation(
        plan=resolved,
        edits=edits,
        num_layers=num_layers,
        depth=(depth, depth),
        params=(params, params + sum(edit.after.params - edit.before.params for edit in edits)),
        flops_per_image=(flops, flops + sum(edit.after.total - edit.before.total for edit in edits)),
    )
    if not (resolved.groups or resolved.pruned):
        return said
    student = _carried_out(meta_copy(model), resolved, edits, seed=0)
    groups, pruned = depth_edits(family, model, student, resolved)
    return replace(
        said,
        groups=groups,
        pruned=pruned,
        depth=(depth, len(family.block_paths(student))),
        params=(params, sum(p.numel() for p in student.parameters())),
        flops_per_image=(flops, family.flops_per_image(student)),
    )


@torch.inference_mode(False)  # weights made in it could never be trained
def graft(
    model: nn.Module, plan: PlanLike, *, seed: int = 0, locality: Locality | None = None, share: bool = False
) -> nn.Module:  # fmt: skip
    """An edited copy of `model`; `model` itself is untouched, also after an error.

    New operators are drawn from (seed, path of the site) and, with `init: donor`, then take over what the donor's
    weights can give. No data is needed. plan: a `GraftPlan`, its entries, its plan-file form, or a plan file.
    share: the weights that stay are the own tensors of `model`, for stages that leave them as they are (stage 1, LoRA);
    a plan with groups of blocks, which are trained, copies all the same. Of a model inside of torch.compile's or data
    parallel's wrapper the copy is bare.
    Raises PlanError or OperatorError.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise PlanError(f"seed={seed!r}: expected a whole number of at least 0")
    model = unwrap(model)  # the record has to be on the model itself, not on torch.compile's wrapper
    resolved, edits = match(model, plan, locality)
    family = family_of(model)
    earlier, seed = record_of(model), int(seed)
    record = GraftRecord(
        plan=GraftPlan([*earlier.plan, *resolved]) if earlier else resolved,
        seed=seed,
        source=earlier.source if earlier else source_of(model),
        architecture=family.architecture(model),
        base_digests=earlier.base_digests if earlier else digests(model),
        pipeline=pipeline_source(model),
    )
    student = _carried_out(model, resolved, edits, seed, share)
    set_record(student, record)
    return student


def _carried_out(
    model: nn.Module, resolved: GraftPlan, edits: tuple[Edit, ...], seed: int, share: bool = False
) -> nn.Module:
    """A copy of `model` with all entries of a matched plan carried out; it has no record yet."""
    family, earlier = family_of(model), record_of(model)
    sites = {(site.kind, site.layer): site for site in family.sites(model)}
    made = {}
    for edit in edits:
        site = sites[edit.site.kind, edit.site.layer]
        made[site.path] = make_operator(family, site, edit.entry, seed)
    everything = _everything(earlier, resolved, family.num_layers(model))
    student = _copy_with(model, made, share and not everything.groups)
    open_groups(family, student, {edit.site.layer for edit in edits})
    for path, operator in made.items():
        student.set_submodule(path, operator)
    rearrange(family, student, resolved, everything, seed)
    return student


def _everything(earlier: GraftRecord | None, resolved: GraftPlan, num_layers: int) -> GraftPlan:
    """This plan and those of earlier grafts as one, which must be one that could be carried out at once."""
    if earlier is None:
        return resolved
    try:
        return GraftPlan([*earlier.plan, *resolved]).resolve(num_layers)
    except PlanError as error:
        raise PlanError(
            f"{error} (entries of an earlier graft are counted first); edit the base with one plan instead"
        ) from None


def make_operator(
    family: Family, site: Site, entry: Replace, seed: int, init: str | None = None
) -> nn.Module:
    """The operator of an entry for one site, initialised as the entry (or `init`) says, on the donor's device."""
    like = next(iter(site.donor.parameters()), torch.empty(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.torch_seed(seed, f"init/{site.path}"))
        with torch.device("meta" if like.is_meta else "cpu"):
            operator = _build(site, entry)
    operator = operator.to(device=like.device, dtype=like.dtype).train(site.donor.training)
    if (init or entry.init) == "donor" and not like.is_meta:
        operators.copy_donor(operator, family.donor_weights(site))
    return family.adapt(site, operator)


def _build(site: Site, entry: Replace) -> nn.Module:
    try:
        return operators.build(
            entry.operator,
            dim=site.width,
            num_heads=site.num_heads,
            num_tokens=site.num_tokens,
            **entry.config.to_dict(),
        )
    except GraftError as error:
        raise type(error)(f"{site}: {error}") from None
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise PlanError(
            f"{site}: operator '{entry.operator}' can't be built as configured ({_first_line(error)}); "
            "change its config"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _check_operator(site: Site, entry: Replace) -> Cost:
    """Build the operator without weights, see that it keeps shape and type, and return its cost."""
    with torch.device("meta"):
        operator = _build(site, entry)
    operator = operator.to("meta")
    if type(operator).__module__.partition(".")[0] != "grafting":
        _check_shape(operator, site, entry)
    return operators.cost_of(operator, num_tokens=site.num_tokens, dim=site.width)


def _check_shape(operator: nn.Module, site: Site, entry: Replace) -> None:
    """Pass tokens through an operator of another package, without arithmetic (it loads PyTorch's compiler: seconds)."""
    if any(isinstance(p, UninitializedParameter) for p in operator.parameters()):
        raise PlanError(
            f"{site}: operator '{entry.operator}' has lazy layers, whose weights have no shape before the first pass: "
            "build them from `dim`"
        )
    x = torch.empty(1, site.num_tokens, site.width, device="meta")
    try:
        y = operator(x)
        shape, dtype = list(y.shape), y.dtype
    except NotImplementedError:
        shape, dtype = (
            list(x.shape),
            x.dtype,
        )  # an operation without a meta kernel: the first real pass will tell
    except GraftError as error:
        raise type(error)(f"{site}: {error}") from None
    except Exception as error:
        raise PlanError(
            f"{site}: operator '{entry.operator}' fails on tokens of shape {list(x.shape)}: "
            f"{_first_line(error)}"
        ) from None
    if shape != list(x.shape):
        raise PlanError(
            f"{site}: operator '{entry.operator}' maps {list(x.shape)} to {shape}; it must keep the shape [B, N, D]"
        )
    if dtype != x.dtype:
        raise PlanError(
            f"{site}: operator '{entry.operator}' gives {dtype} for tokens of {x.dtype}; it must keep their type"
        )


def _copy_with(model: nn.Module, replacements: dict[str, nn.Module], share: bool = False) -> nn.Module:
    """A deep copy in which the modules at these paths are new; the replaced ones are not copied.

    share: modules are copied, the tensors in them are not.
    """
    memo: dict[int, Any] = {}
    if share:
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for path, operator in replacements.items():
        try:
            memo[id(model.get_submodule(path))] = operator
        except AttributeError:
            continue  # in a branch of a group whose branches run as one: replaced when the group is open
    return copy.deepcopy(model, memo)

"""What a plan changes, counted as Table 4 of arXiv 2506.05340 counts: in per cent of all operators of the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grafting import operators
from grafting.explanation import Explanation
from grafting.families import families, family_of
from grafting.plan import GraftPlan
from grafting.selectors import Locality
from grafting.surgery import explain, record_of


def plan_cost(
    model: nn.Module, plan: GraftPlan | None = None, locality: Locality | None = None
) -> dict[str, Any]:
    """Changes per (target, operator), per layer and of the whole model.

    plan: None for the plan that an edited model carries, against its base (an unedited model changes nothing).
    {"rows": [{"target", "operator", "layers", "flops_op_pct", "flops_ft_pct", "flops_pct", "params_pct"}],
    "layers": [{"layer", "target", "operator", "flops_op", "flops_ft", "params"}], "model": {"params",
    "flops_per_image", "depth", "flops_op", "flops_ft"}}. Percentages are of all operators of that target in the
    unedited model; `flops_ft_pct` is None where the target has no projections or featurizers of its own (mlp),
    `flops_pct` is both together. Groups side by side (target `block_group`) and pruned blocks (`block`) have theirs of
    all blocks, with all FLOPs under `flops_op_pct`. The figures of layers (one per site) and of the model are
    [before, after], for one image, 2 FLOPs per multiply-add.
    """
    model, plan = _base_and_plan(model, plan)
    explanation = explain(model, plan, locality)
    edits_at = {edit.site.path: edit for edit in explanation.edits}
    pruned = {block.layer for block in explanation.pruned}
    totals: dict[str, operators.Cost] = {}
    layers: list[dict[str, Any]] = []
    for site in family_of(model).sites(model):
        cost = site.cost
        totals[site.kind] = totals[site.kind] + cost if site.kind in totals else cost
        edit = edits_at.get(site.path)
        after, name = (edit.after, edit.entry.operator) if edit else (cost, site.operator)
        if site.layer in pruned:
            after, name = operators.Cost(0.0, 0.0, 0), "nothing"
        layers.append({
            "layer": site.layer, "target": site.kind, "operator": [site.operator, name],
            "flops_op": [cost.operator, after.operator], "flops_ft": [cost.featurizer, after.featurizer],
            "params": [cost.params, after.params],
        })  # fmt: skip
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for edit in explanation.edits:
        groups.setdefault((edit.site.kind, edit.entry.operator, str(edit.entry.config)), []).append(edit)
    rows = []
    for (target, operator, _), edits in groups.items():
        total = totals[target]
        op = sum(edit.after.operator - edit.before.operator for edit in edits)
        ft = sum(edit.after.featurizer - edit.before.featurizer for edit in edits)
        params = sum(edit.after.params - edit.before.params for edit in edits)
        rows.append({
            "target": target,
            "operator": operator,
            "layers": [edit.site.layer for edit in edits],
            "flops_op_pct": _per_cent(op, total.operator),
            "flops_ft_pct": _per_cent(ft, total.featurizer) if total.featurizer else None,
            "flops_pct": _per_cent(op + ft, total.total),
            "params_pct": _per_cent(params, total.params),
        })  # fmt: skip
    return {
        "rows": rows + _depth_rows(model, explanation),
        "layers": layers,
        "model": {
            **explanation.to_dict()["model"],
            **{key: [sum(layer[key][side] for layer in layers) for side in (0, 1)]
               for key in ("flops_op", "flops_ft")},
        },
    }  # fmt: skip


def base_of(model: nn.Module, *, device: str | torch.device = "meta") -> nn.Module:
    """An unedited model of the architecture that an edited one was made from, with random weights.

    On the meta device, the default, without any.
    """
    record = record_of(model)
    if record is None:
        return model
    family = families()[record.architecture["family"]]
    with torch.random.fork_rng(devices=[]), torch.device("meta" if str(device) == "meta" else "cpu"):
        base = family.build(record.architecture)
    return base.to(device)


def _base_and_plan(model: nn.Module, plan: GraftPlan | None) -> tuple[nn.Module, GraftPlan]:
    if plan is not None:
        return model, plan
    record = record_of(model)
    return (model, GraftPlan.empty()) if record is None else (base_of(model), record.plan)


def _depth_rows(model: nn.Module, explanation: Explanation) -> list[dict[str, Any]]:
    """One row per kind of merge, and one for the pruned blocks."""
    if not (explanation.groups or explanation.pruned):
        return []
    family = family_of(model)
    whole = family.span(model, range(family.num_layers(model)))
    total = operators.Cost(0.0, 0.0, 0)
    for path in family.block_paths(model):
        block = model.get_submodule(path)
        total = total + operators.cost_of(block, num_tokens=whole.num_tokens, dim=whole.width)
    kinds: dict[tuple[str, str], list[tuple[Sequence[int], operators.Cost, operators.Cost]]] = {}
    for group in explanation.groups:
        found = (group.site.layers, group.before, group.after)
        kinds.setdefault((group.site.kind, f"side by side, {group.entry.merge}"), []).append(found)
    for pruned in explanation.pruned:
        dropped = ((pruned.layer,), pruned.before, operators.Cost(0.0, 0.0, 0))
        kinds.setdefault(("block", "nothing"), []).append(dropped)
    return [
        {
            "target": target,
            "operator": operator,
            "layers": [layer for layers, _, _ in members for layer in layers],
            **dict.fromkeys(
                ("flops_op_pct", "flops_pct"),
                _per_cent(sum(new.total - old.total for _, old, new in members), total.total),
            ),
            "flops_ft_pct": None,
            "params_pct": _per_cent(sum(new.params - old.params for _, old, new in members), total.params),
        }
        for (target, operator), members in kinds.items()
    ]


def _per_cent(change: float, total: float) -> float:
    return round(100 * change / total, 4) if total else 0.0

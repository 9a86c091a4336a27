"""What a plan changes, counted as Table 4 of arXiv 2506.05340 counts: in per cent of all operators of the target."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grafting import operators
from grafting.families import families, family_of
from grafting.plan import GraftPlan
from grafting.selectors import Locality
from grafting.surgery import explain, record_of


def plan_cost(
    model: nn.Module, plan: GraftPlan | None = None, locality: Locality | None = None
) -> dict[str, Any]:
    """Changes per (target, operator), per layer and of the whole model.

    plan: None for the plan that an edited model carries, against its base (an unedited model changes nothing).
    {"rows": [{"target", "operator", "layers", "flops_op_pct", "flops_ft_pct", "params_pct"}], "layers": [{"layer",
    "target", "operator", "flops_op", "flops_ft", "params"}], "model": {"params", "flops_per_image", "flops_op",
    "flops_ft"}}. Percentages are of all operators of that target in the unedited model; `flops_ft_pct` is None where
    the target has no projections or featurizers of its own (mlp). The figures of layers (one per site) and of the
    model are [before, after], for one image, 2 FLOPs per multiply-add.
    """
    model, plan = _base_and_plan(model, plan)
    explanation = explain(model, plan, locality)
    edits_at = {edit.site.path: edit for edit in explanation.edits}
    totals: dict[str, operators.Cost] = {}
    layers: list[dict[str, Any]] = []
    for site in family_of(model).sites(model):
        cost = site.cost
        totals[site.kind] = totals[site.kind] + cost if site.kind in totals else cost
        edit = edits_at.get(site.path)
        after, name = (edit.after, edit.entry.operator) if edit else (cost, site.operator)
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
            "params_pct": _per_cent(params, total.params),
        })  # fmt: skip
    return {
        "rows": rows,
        "layers": layers,
        "model": {
            "params": list(explanation.params),
            "flops_per_image": list(explanation.flops_per_image),
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


def _per_cent(change: float, total: float) -> float:
    return round(100 * change / total, 4) if total else 0.0

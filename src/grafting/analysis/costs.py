"""What a plan changes, counted as Table 4 of arXiv 2506.05340 counts: in per cent of all operators of the target."""

from __future__ import annotations

from typing import Any

from torch import nn

from grafting import operators
from grafting.families import family_of
from grafting.plan import GraftPlan
from grafting.selectors import Locality
from grafting.surgery import explain


def plan_cost(model: nn.Module, plan: GraftPlan, locality: Locality | None = None) -> dict[str, Any]:
    """Changes per (target, operator) and of the whole model.

    {"rows": [{"target", "operator", "layers", "flops_op_pct", "flops_ft_pct", "params_pct"}], "model": {"params",
    "flops_per_image"} each [before, after]}. Percentages are of all operators of that target in the unedited model;
    `flops_ft_pct` is None where the target has no projections or featurizers of its own (mlp).
    """
    explanation = explain(model, plan, locality)
    totals: dict[str, operators.Cost] = {}
    for site in family_of(model).sites(model):
        cost = site.cost
        totals[site.kind] = totals[site.kind] + cost if site.kind in totals else cost
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
        "model": {"params": list(explanation.params), "flops_per_image": list(explanation.flops_per_image)},
    }


def _per_cent(change: float, total: float) -> float:
    return round(100 * change / total, 4) if total else 0.0

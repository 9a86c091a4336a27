"""What a model is, in numbers."""

from __future__ import annotations

from typing import Any

from torch import nn

from grafting.families import family_of
from grafting.surgery import record_of


def inspect_model(model: nn.Module) -> dict[str, Any]:
    """Architecture, parameters, FLOPs (2 per multiply-add), the plan if it was edited, and every site."""
    family, record = family_of(model), record_of(model)
    sites = []
    for site in family.sites(model):
        cost = site.cost
        sites.append({
            "layer": site.layer, "target": site.kind, "operator": site.operator, "path": site.path,
            "params": cost.params, "flops": cost.total,
        })  # fmt: skip
    return {
        "architecture": family.architecture(model),
        "num_layers": family.num_layers(model),
        "params": sum(p.numel() for p in model.parameters()),
        "flops_per_image": family.flops_per_image(model),
        "plan": record.plan.to_dict() if record else None,
        "sites": sites,
    }

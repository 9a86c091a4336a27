"""What a model is, in numbers."""

from __future__ import annotations

from typing import Any

from torch import nn

from grafting.families import family_of
from grafting.surgery import record_of


def inspect_model(model: nn.Module) -> dict[str, Any]:
    """Architecture, parameters, FLOPs (2 per multiply-add), the plan if it was edited, and every site.

    `share_of_flops`: of all operators of a target, in the whole model; for mha also of its scores and weighted sums.
    """
    family, record = family_of(model), record_of(model)
    sites = []
    for site in family.sites(model):
        cost = site.cost
        sites.append({
            "layer": site.layer, "target": site.kind, "operator": site.operator, "path": site.path,
            "params": cost.params, "flops": cost.total,
        })  # fmt: skip
    flops = family.flops_per_image(model)
    shares: dict[str, float] = {}
    for site in family.sites(model):
        shares[site.kind] = shares.get(site.kind, 0.0) + site.cost.total / flops
        if site.kind == "mha":
            shares["mha without projections"] = (
                shares.get("mha without projections", 0.0) + site.cost.operator / flops
            )
    return {
        "architecture": family.architecture(model),
        "num_layers": family.num_layers(model),
        "depth": len(family.block_paths(model)),
        "params": sum(p.numel() for p in model.parameters()),
        "flops_per_image": flops,
        "share_of_flops": {name: round(share, 4) for name, share in shares.items()},
        "plan": record.plan.to_dict() if record else None,
        "groups": [
            {"path": group.path, "layers": list(group.layers), "merge": group.donor.form,
             "runs": "as one" if group.donor.is_stacked else "in sequence"}
            for group in family.group_sites(model)
        ],
        "sites": sites,
    }  # fmt: skip

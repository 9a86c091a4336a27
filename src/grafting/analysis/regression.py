"""Which regression loss an operator's outputs ask for: the rule behind `loss: auto`.

The loss is a sum over channels, and each channel has its own weights in an operator's last layer. So what counts is the
shape of a channel's distribution, not that channels differ in scale. For a location, L2 estimates by the mean and L1
by the median; the median has the smaller asymptotic variance where (2 f sigma)^2 > 1, f the density at the centre and
sigma the deviation: 0.64 for a normal distribution, 2 for a Laplace one. Outputs stand in here for the errors that the
loss will see, which exist only once an operator is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from grafting.errors import DataError
from grafting.yaml_io import load_json

Loss = Literal["l1", "l2"]
THRESHOLD = 1.0


def choose_loss(median_efficiency: float | None) -> Loss:
    """L1 where the median is more efficient than the mean, else L2 (also where all is constant)."""
    return "l1" if median_efficiency is not None and median_efficiency > THRESHOLD else "l2"


def recommend(sites: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per target, the loss that the median of its sites' efficiencies asks for, with the reason in words."""
    found: dict[str, dict[str, Any]] = {}
    for target in dict.fromkeys(site["target"] for site in sites):
        mine = [site for site in sites if site["target"] == target]
        known = sorted(e for site in mine if (e := site["output"]["median_efficiency"]) is not None)
        middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else None
        loss = choose_loss(middle)
        own = sum(site["loss"] == "l1" for site in mine)
        why = (
            "its outputs are constant" if middle is None
            else f"the median of a channel's outputs is {middle:.2f} times as efficient as their mean "
            f"({'above' if loss == 'l1' else 'not above'} {THRESHOLD:g}; normal 0.64, Laplace 2)"
        )  # fmt: skip
        found[target] = {
            "loss": loss, "median_efficiency": middle, "num_sites": len(mine), "num_l1": own,
            "reason": f"{why}; site by site {own} of {len(mine)} ask for l1",
        }  # fmt: skip
    return found


def read_losses(path: str | Path) -> dict[str, Loss]:
    """Site path -> loss, from a file of `graft activations`. Raises DataError for anything else."""
    data = load_json(Path(path), "activations file", DataError)
    sites = data.get("sites") if isinstance(data, Mapping) else None
    if not isinstance(sites, (list, tuple)):
        raise DataError(f"{str(path)!r} has no list 'sites'; write it with `graft activations`")
    losses: dict[str, Loss] = {}
    for number, site in enumerate(sites):
        name, loss = (site.get("path"), site.get("loss")) if isinstance(site, Mapping) else (None, None)
        if not isinstance(name, str) or loss not in ("l1", "l2"):
            raise DataError(
                f"{str(path)!r}: sites[{number}] needs a 'path' and a 'loss' of l1 or l2; write the file with "
                "`graft activations`"
            )
        losses[name] = loss
    return losses

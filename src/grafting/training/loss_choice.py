"""`loss: auto`: a regression loss per operator, from an activations file or from its donor's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from grafting.analysis.moments import Passes, describe
from grafting.analysis.regression import choose_loss, read_losses
from grafting.errors import PlanError


def settle_losses(
    paths: Sequence[str], outputs: Passes, file: str | None
) -> tuple[dict[str, str], dict[str, float | None]]:
    """(path -> loss, path -> efficiency of the median), by the rule of `grafting.analysis.regression`.

    outputs: the donors' outputs on calibration samples, passed over twice; with a `file` of `graft activations` it is
    not touched and there are no efficiencies. Raises DataError (the file), PlanError (a path that is not in it).
    """
    if file is not None:
        known = read_losses(file)
        for path in paths:
            if path not in known:
                raise PlanError(
                    f"loss: auto of {path}: {file!r} has no such site; run `graft activations` on the teacher, or "
                    "leave out distill.activations to have it measured"
                )
        return {path: known[path] for path in paths}, {}
    found = {path: statistics["median_efficiency"] for path, statistics in describe(outputs).items()}
    return {path: choose_loss(found[path]) for path in paths}, found

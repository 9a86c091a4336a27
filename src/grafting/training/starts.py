"""The first act of stage 1: regression losses that were left open are settled, and readouts are fitted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grafting.depth import randomly_merged
from grafting.families import Family, Tap
from grafting.models.groups import BlockGroup
from grafting.operators import Operator, takes_donor
from grafting.plan import Parallelize, Replace
from grafting.surgery import make_operator, record_of
from grafting.training.config import DistillConfig
from grafting.training.initialization import ReadoutFit
from grafting.training.loss_choice import settle_losses
from grafting.training.pupils import Pupil

FIT_BYTES = 2 << 30  # of the readout fits that are under way together
Errors = Callable[[Mapping[str, nn.Module]], dict[str, float]]  # modules by path -> held-out errors
Calibration = Callable[
    [list[str]], Iterator[dict[str, Tap]]
]  # paths -> the teacher's taps, a batch at a time


def choose_losses(
    pupils: Sequence[Pupil], calibration: Calibration, activations: str | None
) -> dict[str, Any] | None:
    """Settle `loss: auto` by the activations file, or by the donors' outputs on the calibration samples.

    What the log says of it: the loss by path, and the figure that it was chosen by; None if nothing was open.
    """
    waiting = {pupil.path: pupil for pupil in pupils if pupil.loss == "auto"}
    if not waiting:
        return None

    def outputs() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for taps in calibration(list(waiting)):
            found = {path: waiting[path].gated(tap.output, tap) for path, tap in taps.items()}
            yield torch.zeros(len(next(iter(found.values()))), dtype=torch.int64), found

    chosen, efficiency = settle_losses(list(waiting), outputs, activations)
    for path, pupil in waiting.items():
        pupil.loss = chosen[path]
    return {"loss": chosen} | ({"median_efficiency": efficiency} if efficiency else {})


def start_pupils(
    family: Family, student: nn.Module, teacher: nn.Module, pupils: Sequence[Pupil], config: DistillConfig,
    errors: Errors, calibration: Calibration, device: torch.device,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Fit the readouts (donor starts) in place; errors at step 0 of random, copied and fitted pupils, by path."""
    found = {"random": errors(_random(family, student, teacher, pupils))}
    started = [pupil for pupil in pupils if pupil.entry.init == "donor" and _has_a_start(pupil.operator)]
    replaced, groups = (
        {p.path: p.operator for p in started if isinstance(p.entry, kind)} for kind in (Replace, Parallelize)
    )
    if started:
        found["copied"] = errors(replaced | groups)
        if config.fit_readout:
            # A merge is fitted to branches that hold their fitted operators.
            found["fitted"] = {}
            copied = found["copied"]
            for modules in (replaced, groups):
                found["fitted"] |= _fit_where_better(
                    modules, copied, errors, calibration, config.fit_ridge, device
                )
                copied = errors(groups) if groups else {}
    return found


def _has_a_start(operator: nn.Module) -> bool:
    """Whether there is another start than the random one: weights of the donor, or a readout that can be fitted."""
    return isinstance(operator, (Operator, BlockGroup)) or takes_donor(type(operator))


def _random(
    family: Family, student: nn.Module, teacher: nn.Module, pupils: Sequence[Pupil]
) -> dict[str, nn.Module]:
    """Every pupil from a random start: a new operator, or a group under a random merge."""
    record = record_of(student)
    seed = record.seed if record else 0
    donors = {site.path: site for site in family.sites(teacher)}
    found: dict[str, nn.Module] = {}
    for pupil in pupils:
        if isinstance(pupil.entry, Replace):
            found[pupil.path] = make_operator(family, donors[pupil.path], pupil.entry, seed, init="random")
        elif isinstance(pupil.operator, BlockGroup):
            found[pupil.path] = randomly_merged(pupil.operator, pupil.path, seed)
    return found


def in_turns(modules: Mapping[str, nn.Module]) -> list[dict[str, Operator | BlockGroup]]:
    """Those with a readout, as many at a time as have normal equations of `FIT_BYTES` together; one at least."""
    found: list[dict[str, Operator | BlockGroup]] = []
    held = 0
    for path, module in modules.items():
        if not isinstance(module, (Operator, BlockGroup)):
            continue
        held += (size := ReadoutFit.num_bytes(module))
        if not found or held > FIT_BYTES:
            found.append({})
            held = size
        found[-1][path] = module
    return found


def _fit_where_better(
    modules: Mapping[str, nn.Module],
    copied: Mapping[str, float],
    errors: Errors,
    calibration: Calibration,
    ridge: float,
    device: torch.device,
) -> dict[str, float]:
    """Fit the readouts; one whose held-out error grew goes back to the copy (a wider MLP is exact as copied)."""
    if not modules:
        return {}
    before = {path: copy.deepcopy(module.state_dict()) for path, module in modules.items()}
    for some in in_turns(modules):
        fits = {path: ReadoutFit(module, device) for path, module in some.items()}
        for taps in calibration(list(fits)):
            for path, tap in taps.items():
                fits[path].add(Tap(tap.input.float(), tap.output.float(), None, tap.cond))
        for fit in fits.values():
            fit.solve(ridge)
    fitted = errors(modules)
    for path, module in modules.items():
        if fitted[path] > copied[path]:
            module.load_state_dict(before[path])
            fitted[path] = copied[path]
    return fitted

"""The choice: at most one option at every site, the least damage in all, within a budget.

Damages and savings are taken to add up, which makes it a multiple-choice knapsack. It is solved for all budgets at once
by the list of its Pareto-optimal partial choices, site after site; exact but for savings, which are counted in whole
millionths of the model's cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grafting.errors import PlanError

UNIT = 1e-6  # of the model's cost


@dataclass(frozen=True)
class Option:
    """A candidate at one site.

    damage: what the model's prediction loses where this is the only edit, at least 0. saving: the share of the model's
    cost that it saves; below 0 where it costs more.
    """

    path: str
    candidate: int
    damage: float
    saving: float


@dataclass(frozen=True)
class Choice:
    """Some options, at most one a site, in the order of the sites."""

    options: tuple[Option, ...]

    @property
    def damage(self) -> float:
        """The sum of the damages."""
        return math.fsum(option.damage for option in self.options)

    @property
    def cost(self) -> float:
        """What the model costs with them, as a share of what it costs without."""
        return 1 - math.fsum(option.saving for option in self.options)


def best_choice(options: Sequence[Option], *, budget: float | None = None, at_least: int = 0) -> Choice:
    """The choice of least damage whose cost is at most `budget` (None: any) and that has `at_least` options.

    The budget is met to within a millionth of the model's cost for every site. Raises PlanError (what is asked can't
    be had, and what can).
    """
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise PlanError(f"budget {budget}: expected a share of the model's cost above 0, such as 0.8")
    found = pareto_choices(options, at_least=at_least)
    slack = UNIT * len({option.path for option in options})
    met = [choice for choice in found if budget is None or choice.cost <= budget + slack]
    if not met:
        raise PlanError(
            f"a budget of {budget:g} of the cost can't be met: with these candidates"
            + (f" and {at_least} operators replaced" if at_least else "")
            + f" the least is {min(choice.cost for choice in found):.4f}"
        )
    return min(met, key=lambda choice: choice.damage)


def pareto_choices(options: Sequence[Option], *, at_least: int = 0) -> tuple[Choice, ...]:
    """All choices of `at_least` options that no other beats in both damage and cost, dearest first.

    Raises PlanError (more than the sites there are, a damage that is no number).
    """
    sites: dict[str, list[Option]] = {}
    for option in options:
        if not (math.isfinite(option.damage) and option.damage >= 0 and math.isfinite(option.saving)):
            raise PlanError(
                f"{option.path}: damage {option.damage} and saving {option.saving} are no numbers"
            )
        sites.setdefault(option.path, []).append(option)
    if not 0 <= at_least <= len(sites):
        raise PlanError(
            f"at least {at_least} operators replaced: there are candidates for {len(sites)} sites"
        )
    count, saved, damage = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1)
    trail = []  # per site: which partial choice each one continues, and by which option (-1: none)
    for left, here in zip(range(len(sites) - 1, -1, -1), sites.values(), strict=True):
        units = np.array([0, *(math.floor(option.saving / UNIT) for option in here)])
        damages = np.array([0.0, *(option.damage for option in here)])
        taken = np.arange(len(units)) - 1
        before, by = (grid.ravel() for grid in np.meshgrid(np.arange(len(count)), taken, indexing="ij"))
        count = np.minimum(count[before] + (by >= 0), at_least)  # more than asked for is as good
        saved, damage = saved[before] + units[by + 1], damage[before] + damages[by + 1]
        kept = _undominated(count, saved, damage, count + left >= at_least)
        count, saved, damage = count[kept], saved[kept], damage[kept]
        trail.append((before[kept], by[kept]))
    return tuple(_traced(end, list(sites.values()), trail) for end in np.argsort(saved, kind="stable"))


def _undominated(
    count: np.ndarray, saved: np.ndarray, damage: np.ndarray, possible: np.ndarray
) -> np.ndarray:
    """Indices of the partial choices that may still become best: of equal count none saves more with less damage."""
    order = np.lexsort((damage, -saved, count))
    order = order[possible[order]]
    kept = []
    for group in np.split(order, np.flatnonzero(np.diff(count[order])) + 1):
        least = np.minimum.accumulate(damage[group])
        kept.append(group[np.r_[True, damage[group][1:] < least[:-1]]])
    return np.concatenate(kept)


def _traced(
    end: int, sites: Sequence[Sequence[Option]], trail: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Choice:
    """The options that a final state was made of."""
    found = []
    for here, (before, by) in zip(reversed(sites), reversed(trail), strict=True):
        if by[end] >= 0:
            found.append(here[by[end]])
        end = before[end]
    return Choice(tuple(reversed(found)))

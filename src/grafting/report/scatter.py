"""Quality against cost: labelled points, groups of them joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafting.report.drawing import (
    AXIS,
    EIGHTH,
    FIFTH,
    FOURTH,
    LARGEST,
    SEVENTH,
    SIXTH,
    SOFT,
    STAND_IN,
    STUDENT,
    TEACHER,
    TEXT_SIZE,
    THIRD,
    log_scale,
    new_axes,
    to_svg,
)  # fmt: skip
from grafting.report.format import si, significant
from grafting.report.html import Html, clean

_KINDS = (STUDENT, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH, SOFT)  # of points; the teacher has its own
_MARKS = "os^D"  # when colours begin anew


@dataclass(frozen=True)
class Point:
    """One labelled point of a scatter plot, with an optional spread of y.

    Points of one group are joined by a line and have one colour, and the group's name in place of theirs. `teacher`:
    what the others are compared with, in its own colour.
    """

    label: str
    x: float
    y: float
    spread: float | None = None
    group: str = ""
    teacher: bool = False

    @property
    def kind(self) -> str:
        """What its colour, its mark and its name in the plot stand for."""
        return self.group or self.label


def scatter_plot(
    points: Sequence[Point], describe: str, *, x_label: str, y_label: str,
    band: tuple[float, float] | None = None,
) -> Html:  # fmt: skip
    """Labelled points, each with its spread of y where there is one; `band` shades values of y.

    A few points far above all others would leave no room for these: they stand at the upper edge, with their value.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = new_axes((5.6, 3.6))
    limit = _far_above([point.y for point in points])
    near = [point for point in points if point.y <= limit]
    beyond = [point for point in points if point.y > limit]
    if band is not None:
        axes.axhspan(*band, color=STAND_IN[TEACHER], alpha=0.12, linewidth=0)
    looks = _looks(points)
    groups: dict[str, list[Point]] = {}
    for point in near:
        if point.group:
            groups.setdefault(point.group, []).append(point)
    for name, members in groups.items():
        if not members[0].teacher:
            color, _ = looks[name]
            axes.plot([p.x for p in members], [p.y for p in members], color=color, linewidth=0.9, alpha=0.6)
    for point in near:
        color, mark = looks[point.kind]
        if point.spread is not None and point.spread > 0:
            axes.errorbar([point.x], [point.y], yerr=[point.spread], color=color, linewidth=0.9, capsize=2)
        axes.plot([point.x], [point.y], mark, color=color, markersize=4.5)
    for point in beyond:
        axes.plot([point.x], [1.0], "^", color=looks[point.kind][0], markersize=6, clip_on=False,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    ys = [point.y for point in near]
    if min(ys) > 1 / LARGEST and max(ys) > 8 * min(ys):
        log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if (largest := max(abs(low), abs(high))) >= 1e5:
            digits = max(
                3, 1 + math.ceil(math.log10(largest / max(high - low, 1e-9 * largest)))
            )  # that ticks differ
            axis.set_major_formatter(FuncFormatter(lambda value, _, digits=digits: si(value, digits=digits)))
    axes.margins(0.1)
    axes.autoscale_view()
    top = float(axes.get_ylim()[1])
    axes.autoscale(False)  # labels are placed by where the points are now
    named = [p for p in near if not p.group or p is groups[p.group][-1]]  # a group once, at its last point
    labels = [_Label(p.kind, p.x, p.y, looks[p.kind][0]) for p in named]
    labels += [_Label(f"{p.label}: {significant(p.y, 3)}", p.x, top, looks[p.kind][0]) for p in beyond]
    _label_points(axes, labels, [*((p.x, p.y) for p in near), *((p.x, top) for p in beyond)])
    axes.set_xlabel(clean(x_label, 80), parse_math=False)
    axes.set_ylabel(clean(y_label, 80), parse_math=False)
    return to_svg(figure, describe)


def _far_above(values: Sequence[float], factor: float = 5.0) -> float:
    """The largest value that still belongs to the others: of 5, 6, 7, 15, 180 it is 15. Infinity where all do.

    A value stands apart where it is over `factor` times the next below it, and so do those above it; a quarter of all
    values at most.
    """
    ordered = sorted(values)
    for i in range(max(3, len(ordered) - len(ordered) // 4), len(ordered)):
        if ordered[i - 1] > 0 and ordered[i] > factor * ordered[i - 1]:
            return ordered[i - 1]
    return float("inf")


def _looks(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Colour and mark of every group and of every point without one, in the order of the points."""
    found: dict[str, tuple[str, str]] = {}
    for point in points:
        if point.kind not in found:
            number = sum(color != STAND_IN[TEACHER] for color, _ in found.values())
            mark = _MARKS[number // len(_KINDS) % len(_MARKS)]
            color = STAND_IN[TEACHER if point.teacher else _KINDS[number % len(_KINDS)]]
            found[point.kind] = (color, "o" if point.teacher else mark)
    return found


@dataclass(frozen=True)
class _Label:
    text: str
    x: float
    y: float
    color: str


def _label_points(axes: Any, labels: Sequence[_Label], marks: Sequence[tuple[float, float]]) -> None:
    """Labels beside their points, on the side that has room, moved up or down where they would meet another or a mark.

    One that finds no room left is left out: the table names every row.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = [tuple(float(value) for value in to_axes.transform(mark)) for mark in marks]
    taken: list[tuple[float, float, float, float]] = [(x - 0.012, x + 0.012, y, 0.03) for x, y in placed]
    for label in sorted(labels, key=lambda item: item.y):
        across, height = (float(value) for value in to_axes.transform((label.x, label.y)))
        words = clean(label.text, 40)
        width, side, up = 0.016 * len(words), 1 if across < 0.6 else -1, height
        start = across + 0.02 if side > 0 else across - 0.02 - width
        places = [height + 0.01 * step for step in range(-100, 101) if -0.02 <= height + 0.01 * step <= 1.02]
        free = [
            place for place in places
            if not any(abs(place - y) < far and start < b and a < start + width for a, b, y, far in taken)
        ]  # fmt: skip
        if not free:
            continue
        up = min(free, key=lambda place: (abs(place - height), -place))
        taken.append((start, start + width, up, 0.05))
        text = across + 0.03 * side
        if abs(up - height) > 0.02:
            axes.plot([across, text - 0.005 * side], [height, up], color=STAND_IN[AXIS], linewidth=0.5,
                      transform=axes.transAxes)  # fmt: skip
        axes.text(text, up, words, transform=axes.transAxes, fontsize=TEXT_SIZE - 0.5, color=label.color,
                  va="center", ha="left" if side > 0 else "right", parse_math=False)  # fmt: skip

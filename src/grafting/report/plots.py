"""Curves over steps, their legend, and what in them is a spike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grafting.report.drawing import (
    ALARM,
    LARGEST,
    STAND_IN,
    STUDENT,
    css,
    drawable,
    log_scale,
    new_axes,
    to_svg,
)
from grafting.report.html import Html, el

_RAMP = (
    (61, 106, 166),
    (141, 100, 150),
    (208, 120, 50),
)  # first block to last; told apart by the colour blind too
MAX_POINTS = 600
MAX_TOTAL_POINTS = 6000


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), a colour (a name of the style sheet or #rrggbb), marks at some of the points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = STUDENT
    dashed: bool = False
    faint: bool = False
    dots: bool = False
    marks: Sequence[int] = ()


def ramp(number: int, total: int) -> str:
    """Colour of item `number` of `total` in order of depth, #rrggbb."""
    place = 2 * number / max(1, total - 1)
    low = min(int(place), 1)
    mixed = (a + (b - a) * (place - low) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def legend(series: Sequence[Series]) -> Html:
    """The names of lines as a list that wraps."""
    return el("ul", [
        el("li", el("i", style=f"background:{css(s.color)}", aria_hidden="true"), s.label) for s in series
    ], class_="legend")  # fmt: skip


def spikes(values: Sequence[float], window: int = 20, factor: float = 6.0) -> list[int]:
    """Positions where a loss jumps above its recent past: median + `factor` robust deviations of the `window` before.

    The deviation is 1.4826 x the median absolute deviation, at least 5 % of the median. The first 5 are never spikes.
    """
    from statistics import median

    found = []
    for i in range(5, len(values)):
        past = values[max(0, i - window) : i]
        middle = median(past)
        deviation = max(1.4826 * median(abs(v - middle) for v in past), 0.05 * abs(middle))
        if values[i] > middle + factor * deviation:
            found.append(i)
    return found


def line_plot(
    series: Sequence[Series], describe: str, *, x_label: str = "step", y_label: str = "", log_y: bool = False,
    tall: bool = True,
) -> Html:  # fmt: skip
    """Lines over steps. describe: what a reader who can't see it is told. A log axis needs positive values."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_axes((4.6, 2.7 if tall else 1.7))
    limit = max(20, min(MAX_POINTS, MAX_TOTAL_POINTS // max(1, len(series))))
    if log_y and any(y <= 1 / LARGEST for s in series for y in s.y):
        log_y = False
    for line in series:
        xs, ys = _thin(line.x, line.y, limit)
        color = STAND_IN.get(line.color, line.color)
        axes.plot(
            xs, ys, color=color, linewidth=0.8 if line.faint else 1.3, alpha=0.55 if line.faint else 1.0,
            linestyle=(0, (4, 2)) if line.dashed else "-", solid_joinstyle="round",
            marker="o" if (line.dots and len(xs) <= 16) or len(xs) == 1 else None, markersize=2.6,
        )  # fmt: skip
        if line.marks:
            axes.plot([line.x[i] for i in line.marks], [line.y[i] for i in line.marks], "o", markersize=6,
                      markerfacecolor="none", markeredgecolor=STAND_IN[ALARM], markeredgewidth=1.1)  # fmt: skip
    if log_y:
        log_scale(axes)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return to_svg(figure, describe)


def _thin(x: Sequence[float], y: Sequence[float], limit: int) -> tuple[list[float], list[float]]:
    """At most about `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(x) <= limit:
        return list(x), list(y)
    size = -(-2 * len(x) // limit)
    kept: list[int] = []
    for start in range(0, len(x), size):
        stretch = range(start, min(start + size, len(x)))
        kept += sorted({min(stretch, key=lambda i: y[i]), max(stretch, key=lambda i: y[i])})
    return [x[i] for i in kept], [y[i] for i in kept]


def points_of(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    """The pairs whose two values are numbers that can be drawn, in order of x."""
    kept = sorted(
        (x, y) for a, b in pairs if (x := drawable(a)) is not None and (y := drawable(b)) is not None
    )
    return [x for x, _ in kept], [y for _, y in kept]

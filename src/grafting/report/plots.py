"""Plots as SVG inside the page: drawn by matplotlib's object interface, coloured by the page's style sheet.

Matplotlib draws in stand-in colours that are then replaced by the page's variables, so that one drawing is right in
light and dark. No text that comes from a file gets into a drawing except labels of points, which are escaped by it.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grafting.report.format import finite, si
from grafting.report.html import Html, clean, el

INK, SOFT, AXIS, GRID, PAPER = "ink", "soft", "axis", "grid", "paper"
TEACHER, STUDENT, THIRD, FOURTH, ALARM = "teacher", "student", "third", "fourth", "alarm"
_NAMES = (INK, SOFT, AXIS, GRID, PAPER, TEACHER, STUDENT, THIRD, FOURTH, ALARM)
_STAND_IN = {name: f"#0{number:x}0b0c" for number, name in enumerate(_NAMES, 1)}
_RAMP = (
    (61, 106, 166),
    (141, 100, 150),
    (208, 120, 50),
)  # first block to last; told apart by the colour blind too
MAX_POINTS = 600
MAX_TOTAL_POINTS = 6000
_TEXT_SIZE = 8.5
_LARGEST = 1e30


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


@dataclass(frozen=True)
class Point:
    """One labelled point of a scatter plot, with an optional spread of y. Points of one group are joined by a line."""

    label: str
    x: float
    y: float
    spread: float | None = None
    group: str = ""


def ramp(number: int, total: int) -> str:
    """Colour of item `number` of `total` in order of depth, #rrggbb."""
    place = 2 * number / max(1, total - 1)
    low = min(int(place), 1)
    mixed = (a + (b - a) * (place - low) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def legend(series: Sequence[Series]) -> Html:
    """The names of lines as a list that wraps."""
    return el("ul", [
        el("li", el("i", style=f"background:{_css(s.color)}", aria_hidden="true"), s.label) for s in series
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

    figure, axes = _axes((4.6, 2.7 if tall else 1.7))
    limit = max(20, min(MAX_POINTS, MAX_TOTAL_POINTS // max(1, len(series))))
    if log_y and any(y <= 1 / _LARGEST for s in series for y in s.y):
        log_y = False
    for line in series:
        xs, ys = _thin(line.x, line.y, limit)
        color = _STAND_IN.get(line.color, line.color)
        axes.plot(
            xs, ys, color=color, linewidth=0.8 if line.faint else 1.3, alpha=0.55 if line.faint else 1.0,
            linestyle=(0, (4, 2)) if line.dashed else "-", solid_joinstyle="round",
            marker="o" if (line.dots and len(xs) <= 16) or len(xs) == 1 else None, markersize=2.6,
        )  # fmt: skip
        if line.marks:
            axes.plot([line.x[i] for i in line.marks], [line.y[i] for i in line.marks], "o", markersize=6,
                      markerfacecolor="none", markeredgecolor=_STAND_IN[ALARM], markeredgewidth=1.1)  # fmt: skip
    if log_y:
        _log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return _svg(figure, axes, describe)


def scatter_plot(points: Sequence[Point], describe: str, *, x_label: str, y_label: str) -> Html:
    """Labelled points, each with its spread of y where there is one."""
    from matplotlib.ticker import FuncFormatter

    figure, axes = _axes((5.6, 3.6))
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point.group:
            groups.setdefault(point.group, []).append(point)
    for members in groups.values():
        axes.plot([p.x for p in members], [p.y for p in members], color=_STAND_IN[AXIS], linewidth=0.8)
    for point in points:
        if point.spread is not None and point.spread > 0:
            axes.errorbar(
                [point.x], [point.y], yerr=[point.spread], color=_STAND_IN[AXIS], linewidth=0.9, capsize=2
            )
        axes.plot([point.x], [point.y], "o", color=_STAND_IN[STUDENT], markersize=4.5)
    ys = [point.y for point in points]
    if min(ys) > 1 / _LARGEST and max(ys) > 8 * min(ys):
        _log_scale(axes)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if max(abs(low), abs(high)) >= 1e5:
            axis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes.margins(0.1)
    axes.autoscale_view()
    ends = [  # of a group, the name once, at its last point
        Point(name, members[-1].x, members[-1].y) for name, members in groups.items()
    ]
    _label_points(axes, [*(p for p in points if not p.group), *ends])
    axes.set_xlabel(clean(x_label, 80), parse_math=False)
    axes.set_ylabel(clean(y_label, 80), parse_math=False)
    return _svg(figure, axes, describe)


def _label_points(axes: Any, points: Sequence[Point]) -> None:
    """Labels beside their points, on the side that has room, moved up or down where they would meet another.

    One that finds no room left is left out: the table names every row.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: p.y):
        across, height = (float(value) for value in to_axes.transform((point.x, point.y)))
        label = clean(point.label, 36)
        width, side, up = 0.016 * len(label), 1 if across < 0.6 else -1, height
        start = across if side > 0 else across - width
        places = [height + 0.01 * step for step in range(-100, 101) if -0.02 <= height + 0.01 * step <= 1.02]
        free = [
            place for place in places
            if not any(abs(place - y) < 0.05 and start < b and a < start + width for a, b, y in taken)
        ]  # fmt: skip
        if not free:
            continue
        up = min(free, key=lambda place: (abs(place - height), -place))
        taken.append((start, start + width, up))
        text = across + 0.03 * side
        if abs(up - height) > 0.02:
            axes.plot([across, text - 0.005 * side], [height, up], color=_STAND_IN[AXIS], linewidth=0.5,
                      transform=axes.transAxes)  # fmt: skip
        axes.text(text, up, label, transform=axes.transAxes, fontsize=_TEXT_SIZE - 0.5, color=_STAND_IN[INK],
                  va="center", ha="left" if side > 0 else "right", parse_math=False)  # fmt: skip


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="tight")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_STAND_IN[AXIS])
        spine.set_linewidth(0.7)
    axes.grid(True, color=_STAND_IN[GRID], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=_STAND_IN[AXIS], labelcolor=_STAND_IN[SOFT], labelsize=_TEXT_SIZE,
                     width=0.7, length=3)  # fmt: skip
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_STAND_IN[SOFT])
        label.set_fontsize(_TEXT_SIZE)
    return figure, axes


def _log_scale(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axis = axes.yaxis
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


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


def _svg(figure: Any, axes: Any, describe: str) -> Html:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    kept_as_text = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grafting"})
    with kept_as_text, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    return _adopt(out.getvalue(), describe)


def _adopt(svg: str, describe: str) -> Html:
    """Matplotlib's SVG as part of a page: its colours are the page's, it has no ids that could meet another's."""
    describe = clean(describe, 2000)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    for name, stand_in in _STAND_IN.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]+;?", "", svg)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))
    prefix = hashlib.sha256(f"{describe}{svg}".encode()).hexdigest()[:8]
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    view = re.search(r'viewBox="[\d. ]+"', svg)
    start = svg.index(">") + 1
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'{view[0] if view else ""} aria-label="{html.escape(describe)}">'
    )
    body = re.sub(r"[ \t]*\n[ \t]*", "\n", svg[start:])
    return Html(opening + body)


def _css(color: str) -> str:
    return f"var(--{color})" if color in _STAND_IN else color


def points_of(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    """The pairs whose two values are numbers that can be drawn, in order of x."""
    kept = sorted(
        (x, y) for a, b in pairs if (x := drawable(a)) is not None and (y := drawable(b)) is not None
    )
    return [x for x, _ in kept], [y for _, y in kept]


def drawable(value: Any) -> float | None:
    """A finite number of at most 1e30, beyond which axes overflow."""
    number = finite(value)
    return number if number is not None and abs(number) <= _LARGEST else None

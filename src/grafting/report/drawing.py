"""A drawing as SVG inside the page: drawn by matplotlib's object interface, coloured by the page's style sheet.

Matplotlib draws in stand-in colours that are then replaced by the page's variables, so that one drawing is right in
light and dark. No text that comes from a file gets into a drawing except labels of points, which are escaped by it.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from typing import Any

from grafting.report.format import finite
from grafting.report.html import Html, clean

INK, SOFT, AXIS, GRID, PAPER = "ink", "soft", "axis", "grid", "paper"
TEACHER, STUDENT, THIRD, FOURTH, ALARM = "teacher", "student", "third", "fourth", "alarm"
FIFTH, SIXTH, SEVENTH, EIGHTH = "fifth", "sixth", "seventh", "eighth"
_NAMES = (INK, SOFT, AXIS, GRID, PAPER, TEACHER, STUDENT, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH, ALARM)
STAND_IN = {name: f"#0{number:x}0b0c" for number, name in enumerate(_NAMES, 1)}
TEXT_SIZE = 8.5
LARGEST = 1e30


def new_axes(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of that size in inches, with empty axes in the page's manner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="tight")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(STAND_IN[AXIS])
        spine.set_linewidth(0.7)
    axes.grid(True, color=STAND_IN[GRID], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=STAND_IN[AXIS], labelcolor=STAND_IN[SOFT], labelsize=TEXT_SIZE,
                     width=0.7, length=3)  # fmt: skip
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(STAND_IN[SOFT])
        label.set_fontsize(TEXT_SIZE)
    return figure, axes


def log_scale(axes: Any) -> None:
    """Make the y axis logarithmic, with ticks that can be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axis = axes.yaxis
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def to_svg(figure: Any, describe: str) -> Html:
    """The figure as part of a page; `describe` is what a reader who can't see it is told."""
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
    for name, stand_in in STAND_IN.items():
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


def css(color: str) -> str:
    """A colour as a style attribute has it."""
    return f"var(--{color})" if color in STAND_IN else color


def drawable(value: Any) -> float | None:
    """A finite number of at most 1e30, beyond which axes overflow."""
    number = finite(value)
    return number if number is not None and abs(number) <= LARGEST else None

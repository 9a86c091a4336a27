"""Heat maps as SVG inside the page: a cell is the page's colour at an opacity, right in light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grafting.report.drawing import AXIS, INK, STAND_IN, STUDENT, drawable, new_axes, to_svg
from grafting.report.format import significant
from grafting.report.html import Html, clean

_STRONGEST = 0.72  # opacity of the highest value: ink on it is still read
_TEXT_SIZE = 6.5
_MAX_CELLS_WITH_TEXT = 24  # columns
_MAX_CELLS = 6000

Values = Sequence[Sequence[float | None] | None]


def heat_map(
    values: Values, describe: str, *, rows: Sequence[str], columns: Sequence[str], row_label: str, column_label: str,
    low: float | None = None, high: float | None = None, log: bool = False,
    show: Callable[[float], str] | None = None,
) -> Html | None:  # fmt: skip
    """Values [R, C] as cells, None left empty; row 0 on top. None if there is nothing that can be drawn.

    low, high: values of no colour and of the strongest; default the least and the largest. log: a logarithmic scale,
    for positive values. show: how a value is written in its cell. describe: what a reader who can't see it is told.
    """
    from math import log10

    from matplotlib.patches import Rectangle

    cells = [
        (r, c, number)
        for r, row in enumerate(values)
        for c, value in enumerate(row or [])
        if (number := drawable(value)) is not None and (number > 0 or not log)
    ][:_MAX_CELLS]
    if not cells:
        return None
    scale: Callable[[float], float] = log10 if log else float
    drawn = [scale(value) for _, _, value in cells]
    bottom = scale(low) if low is not None else min(drawn)
    top = scale(high) if high is not None else max(drawn)
    figure, axes = new_axes(
        (min(9.0, max(4.6, 0.9 + 0.42 * len(columns))), min(12.0, 0.75 + 0.23 * len(rows)))
    )
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (r, c, value), place in zip(cells, drawn, strict=True):
        share = 0.0 if top <= bottom else min(1.0, max(0.0, (place - bottom) / (top - bottom)))
        for color, opacity in ((AXIS, 0.10), (STUDENT, _STRONGEST * share)):
            axes.add_patch(
                Rectangle((c - 0.47, r - 0.46), 0.94, 0.92, facecolor=STAND_IN[color], alpha=opacity,
                          edgecolor="none", clip_on=False)
            )  # fmt: skip
        if len(columns) <= _MAX_CELLS_WITH_TEXT:
            text = show(value) if show else significant(value, 2)
            axes.text(c, r, text, ha="center", va="center", fontsize=_TEXT_SIZE, color=STAND_IN[INK],
                      parse_math=False)  # fmt: skip
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [clean(name, 16) for name in columns])
    axes.set_yticks(range(len(rows)), [clean(name, 24) for name in rows])
    axes.tick_params(length=0, labelsize=_TEXT_SIZE + 0.5)
    axes.set_xlabel(clean(column_label, 60), parse_math=False)
    axes.set_ylabel(clean(row_label, 60), parse_math=False)
    return to_svg(figure, describe)

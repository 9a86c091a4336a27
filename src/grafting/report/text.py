"""Results as plain text, for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grafting.selectors import format_layers

_SCALES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def number(value: Any) -> str:
    """A value as a person reads it: 3.66M parameters, 0.0123, [1, 3, 5]."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int) and abs(value) < 100_000:
        return str(value)
    if isinstance(value, (int, float)):
        if abs(value) >= 1e5:
            unit, scale = next((unit, scale) for unit, scale in _SCALES if abs(value) >= scale)
            return f"{value / scale:.4g}{unit}"
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " -> ".join(map(number, value)) if len(value) == 2 else ",".join(map(number, value))
    return str(value)


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns aligned, numbers to the right, one row a line."""
    cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    widths = [max([len(column), *(len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    right = [bool(rows) and all(_is_number(row.get(column)) for row in rows) for column in columns]

    def line(texts: Sequence[str]) -> str:
        placed = (text.rjust(width) if to_right else text.ljust(width)
                  for text, width, to_right in zip(texts, widths, right, strict=True))  # fmt: skip
        return "  ".join(placed).rstrip()

    return "\n".join(line(row) for row in [list(columns), *cells])


def _cell(column: str, value: Any) -> str:
    """A value under its column; numbers of layers as ranges, where two would else read as before and after."""
    if column == "layers" and isinstance(value, list) and all(isinstance(layer, int) for layer in value):
        return format_layers(value)
    return number(value)


def lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A nested mapping as indented lines."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}"
            yield from lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}"
            yield from (f"{indent}  {json.dumps(item)}" for item in value)
        else:
            yield f"{indent}{key}: {number(value)}"


def results_table(folder: Path) -> str:
    """Teacher and student side by side, from evaluation.json; empty if there is none that can be read."""
    from grafting.report.reading import read_run
    from grafting.report.words import MEASURES, measures

    if not (folder / "evaluation.json").is_file():
        return ""
    better = {True: "higher", False: "lower", None: None}
    rows = [
        {
            "": name,
            "teacher": a,
            "student": b,
            "ratio": ratio,
            "better": better[MEASURES.get(name, ("", None))[1]],
        }
        for name, (a, b, ratio) in measures(read_run(folder)).items()
    ]
    return table(("", "teacher", "student", "ratio", "better"), rows) if rows else ""


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))

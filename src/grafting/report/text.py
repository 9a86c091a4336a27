"""Results as plain text, for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def number(value: Any) -> str:
    """A value as a person reads it: 3.66M parameters, 0.0123, [1, 3, 5]."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int) and abs(value) < 100_000:
        return str(value)
    if isinstance(value, (int, float)):
        for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e5)):
            if abs(value) >= scale:
                return f"{value / (1e3 if unit == 'k' else scale):.4g}{unit}"
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " -> ".join(map(number, value)) if len(value) == 2 else ",".join(map(number, value))
    return str(value)


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns aligned, one row a line."""
    cells = [[number(row.get(column)) for column in columns] for row in rows]
    widths = [max([len(column), *(len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in [list(columns), *cells])  # fmt: skip


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
    """Teacher and student side by side, from evaluation.json; empty if there is none."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return ""
    metrics = json.loads(path.read_text())["comparison"]["metrics"]
    rows = [
        {"": name, "teacher": m["a"], "student": m["b"], "ratio": m["ratio"]} for name, m in metrics.items()
    ]
    return table(("", "teacher", "student", "ratio"), rows)

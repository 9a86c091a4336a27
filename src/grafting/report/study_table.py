"""What of a study's rows goes into a table: which columns tell them apart, and how a column's numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grafting.report.format import MISSING, alike, duration, finite, hundredths, mapping, sequence, unbroken
from grafting.report.html import Child, Column
from grafting.report.words import plain

Rows = list[Mapping[str, Any]]
Columns = list[tuple[str, str]]


def columns_of(study: Mapping[str, Any]) -> Columns:
    """(key, label) of every column that a study or a table of it names."""
    found = [mapping(column) for column in sequence(study.get("columns"))]
    return [(plain(c["key"]), plain(c.get("label", c["key"]))) for c in found if "key" in c]


def label_of(row: Mapping[str, Any]) -> str:
    """What a row is called on the page."""
    return unbroken(plain(row.get("label") or row.get("name") or "?"))


def cells_of(first: str, columns: Columns, rows: Rows) -> tuple[list[Column], list[list[Child]]]:
    """Headers and cells: numbers of a column alike; a row that holds nothing but what became of it says that."""
    held = {key: [row[key] for row in rows if row.get(key) is not None] for key, _ in columns}
    write = {key: _written(key, rows) for key in held}
    words = {
        key for key, values in held.items() if values and all(isinstance(value, str) for value in values)
    }
    heads = [Column(first, True), *[Column(label, key in words) for key, label in columns]]
    body: list[list[Child]] = []
    for row in rows:
        said = row.get("status")
        if isinstance(said, str) and all(
            row.get(key) is None for key in _measured(columns) if key != "status"
        ):
            body.append([label_of(row), said])
        else:
            body.append([label_of(row), *[_value(row, key, write[key]) for key, _ in columns]])
    return heads, body


def _measured(columns: Columns) -> list[str]:
    """The columns of what was found out here: all but the paper's figures."""
    return [key for key, _ in columns if not key.startswith("paper")]


def varied(columns: Columns, rows: Rows) -> tuple[Columns, list[str]]:
    """The columns that tell rows apart, and sentences on those that have one value in all rows.

    A column that only rows which nobody edited have a value in is left out.
    """
    figures = [key for key in _measured(columns) if key != "status"]
    done = [row for row in rows if any(row.get(key) is not None for key in figures)]
    edited = [row for row in done if not row.get("unedited")]
    kept: Columns = []
    same: dict[str, list[str]] = {}
    for key, label in columns:
        if key == "status":
            kept += [(key, label)] if any(row.get(key) for row in done) else []
            continue
        values = {plain(row.get(key)) for row in edited}
        others = {plain(row.get(key)) for row in done if row.get("unedited") and row.get(key) is not None}
        if values == {plain(None)}:
            continue
        if (
            len(edited) > 1
            and len(values) == 1
            and others <= values
            and finite(edited[0].get(key)) is not None
        ):
            where = "all" if others or len(edited) == len(done) else "all that are edited"
            same.setdefault(where, []).append(f"{label} {_written(key, edited)(edited[0][key])}")
        else:
            kept.append((key, label))
    return kept, [f"The same in {where}: {'; '.join(what)}." for where, what in same.items()]


def _written(key: str, rows: Rows) -> Callable[[Any], str]:
    """How the numbers of a column are written."""
    if key == "seconds":
        return duration
    if key.endswith("_pct"):
        return hundredths
    return alike([row.get(key) for row in rows], [mapping(row.get("std")).get(key) for row in rows])


def _value(row: Mapping[str, Any], key: str, write: Callable[[Any], str]) -> str:
    value = row.get(key)
    if value is None or finite(value) is None:
        return MISSING if value is None or isinstance(value, float) else plain(value)
    spread = finite(mapping(row.get("std")).get(key))
    return write(value) if spread is None else f"{write(value)} ± {write(spread)}"

"""Quality against cost of a study's rows, as a figure of its page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from grafting.report.drawing import drawable
from grafting.report.format import finite, mapping, significant
from grafting.report.html import Html, figure
from grafting.report.scatter import Point, scatter_plot
from grafting.report.study_table import Rows, columns_of, label_of
from grafting.report.words import plain


def tradeoff(study: Mapping[str, Any], rows: Rows, wanted: Mapping[str, Any]) -> Html | None:
    """A figure of the rows' values of wanted["y"] over wanted["x"]; None where x is the same in all.

    Where y is the Fréchet distance, a band shows which distances can't be told from the teacher's.
    """
    x_key, y_key = plain(wanted.get("x")), plain(wanted.get("y"))
    labels = dict(columns_of(study))
    names = _group_names(rows)
    points = [
        Point(label_of(row), x, y, drawable(mapping(row.get("std")).get(y_key)), names.get(_group(row), ""),
              bool(row.get("unedited")))
        for row in rows
        if (x := drawable(row.get(x_key))) is not None and (y := drawable(row.get(y_key))) is not None
    ]  # fmt: skip
    if len({point.x for point in points}) < min(2, len(rows)):
        return None  # nothing was varied there
    x_label, y_label = labels.get(x_key, x_key), labels.get(y_key, y_key)
    described = "; ".join(f"{p.label}: {significant(p.x, 3)}, {significant(p.y, 3)}" for p in points)
    noise = mapping(study.get("noise"))
    mean, margin = finite(noise.get("mean")), finite(noise.get("margin"))
    band = None
    if y_key == "distance" and mean is not None and margin is not None:
        band = (mean - margin, mean + margin)
    plot = scatter_plot(
        points, f"{y_label} against {x_label}. {described}", x_label=x_label, y_label=y_label, band=band
    )
    said = [f"{y_label} against {x_label}, one point a row"]
    if any(p.group and not p.teacher for p in points):
        said.append("rows that differ in the share of layers, the seed or the learning rate alone are joined")
    if band is not None:
        said.append(
            "the band is the teacher's mean over noise seeds, ± what a difference must exceed to count"
        )
    return figure(plot, f"{'; '.join(said)}.")


def _group(row: Mapping[str, Any]) -> str:
    return "teacher" if row.get("unedited") else plain(row.get("group") or "")


def _group_names(rows: Rows) -> dict[str, str]:
    """What the labels of a group's rows begin with, up to where they differ: "MHA → Hyena-X" of ", 50 %", ", 75 %"."""
    found: dict[str, str] = {}
    for row in rows:
        if group := _group(row):
            parts = label_of(row).split(", ")
            known = found[group].split(", ") if group in found else parts
            same = itertools.takewhile(lambda both: both[0] == both[1], zip(known, parts, strict=False))
            found[group] = ", ".join(part for part, _ in same)
    return {group: name or group for group, name in found.items()}

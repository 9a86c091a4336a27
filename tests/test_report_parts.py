"""What pages are made of: images, plots, escaped text, tables and numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_tools import make_run

from grafting.report import format as fmt
from grafting.report.html import Column, Html, data_table, el
from grafting.report.images import by_class, pair_distance, strip
from grafting.report.plots import Series, line_plot, points_of, spikes
from grafting.report.scatter import Point, scatter_plot
from grafting.report.text import lines, number, results_table, table


def test_samples_are_shown_exactly() -> None:
    import base64
    import io

    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    uri, width, height = strip(images)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L"))
    assert (width, height) == (28 * 8, 8 * 8)
    for i in range(3):
        np.testing.assert_array_equal(shown[:, 10 * i : 10 * i + 8], images[i, :, :, 0])


def test_by_class() -> None:
    labels = np.arange(40) % 10
    groups = by_class(labels, 40)
    assert [label for label, _ in groups] == list(range(10))
    assert groups[3] == (3, [3, 13, 23, 33])
    assert by_class(np.arange(40), 40) == [(None, list(range(s, s + 8))) for s in (0, 8, 16)]
    assert by_class(None, 3) == [(None, [0, 1, 2])]


def test_pair_distance() -> None:
    a, b = np.full((2, 1, 1, 1), 250, np.uint8), np.full((2, 1, 1, 1), 5, np.uint8)
    assert pair_distance(a, b) == 245.0


def test_spikes() -> None:
    values = [1.0 + 0.01 * (i % 4) for i in range(60)]
    assert spikes(values) == []
    values[40] = 3.0
    assert spikes(values) == [40]
    assert spikes([math.exp(-i / 10) for i in range(60)]) == []
    assert spikes([0.0] * 10) == []


def test_plots_take_strange_input() -> None:
    svg = line_plot([Series("a", [1, 2], [0.0, -1.0])], 'a "b" <c>', log_y=True)
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in svg
    assert line_plot([Series("one", [1.0], [1.0])], "one", log_y=True).startswith("<svg")
    x, y = points_of([(1, 1e300), (3, 1e-300), (2, 1e30), ("a", 1), (4, None), (5, float("nan"))])
    assert (x, y) == ([2, 3], [1e30, 1e-300])
    assert line_plot([Series("wide", x, y)], "wide", log_y=True).startswith("<svg")
    points = [Point(f"$x_{{ {i} <b> 漢字", float(i % 2), 1.0, 0.1) for i in range(4)]
    assert "<b>" not in scatter_plot(points, "points", x_label="$\\bad", y_label="<y>")


def test_labels_of_many_points_stay_in_the_plot() -> None:
    """Fifty rows at one place pushed each other out of the page; those without room are left to the table."""
    points = [Point(f"row-number-{i}-of-many", 1e6 + i % 2, 5.0 + 0.01 * i) for i in range(50)]
    svg = scatter_plot([*points, Point("elsewhere", 2e6, 9.0)], "points", x_label="x", y_label="y")
    (height,) = (float(size) for size in re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg))
    labels = re.findall(r'<text[^>]* y="([-\d.]+)"[^>]*>(row|elsewhere)', svg)
    assert 10 < len(labels) < 50
    assert all(0 < float(y) < height for y, _ in labels)
    assert labels[-1][1] == "elsewhere"


def test_points_far_above_stand_at_the_edge() -> None:
    """One untrained row of 176 left the others, between 5 and 15, on one line."""
    near = [Point(f"row {i}", i, 5.0 + i) for i in range(10)]
    svg = scatter_plot([*near, Point("untrained", 3, 176.0)], "points", x_label="x", y_label="y")
    ticks = [float(text) for text in re.findall(r">(\d+)</text>", svg)]
    assert max(ticks) < 20
    assert ">untrained: 176</text>" in svg
    together = scatter_plot([*near, Point("next", 3, 40.0)], "points", x_label="x", y_label="y")
    assert ">next</text>" in together


def test_escaping_by_construction() -> None:
    assert (
        el("p", "<b>", el("i", "&"), ["x", None, 3], title='"')
        == '<p title="&quot;">&lt;b&gt;<i>&amp;</i>x3</p>'
    )
    assert el("td", Html("<b></b>"), class_="n") == '<td class="n"><b></b></td>'
    rows = [[str(i), i] for i in range(500)]
    assert "100 more rows are not shown." in data_table("t", [Column("a", True), Column("b")], rows)


@pytest.mark.parametrize(("value", "text"), [
    (0.123456, "0.1235"), (33.1502, "33.15"), (1234.5, "1,234"), (-2.5, "−2.500"), (0, "0"), (1.5e-9, "1.50e−9"),
    (None, "–"), (float("nan"), "–"), (True, "–"), (10**400, "–"),
])  # fmt: skip
def test_significant(value: Any, text: str) -> None:
    assert fmt.significant(value) == text


@pytest.mark.parametrize(("values", "written"), [
    ([5.637, 176.299, 6.0], ["5.64", "176.30", "6.00"]),
    ([0.864, 0.062, 0.5], ["0.864", "0.062", "0.500"]),
    ([12, 12.0, 6], ["12", "12", "6"]),
    ([0.5, 0.25, None, float("nan")], ["0.50", "0.25", "–", "–"]),
    ([1.36, 1.29, 0.00042], ["1.36", "1.29", "0.0004"]),  # small, and not nothing
    ([-48.08, 0.0, 1.17], ["−48.1", "0.0", "1.2"]),
    ([3.66e6, 120.0], ["3.66 M", "120"]),
    ([1e-7, 5.0], ["1.0e−7", "5.00"]),
    ([None], ["–"]),
])  # fmt: skip
def test_numbers_of_a_column(values: list[Any], written: list[str]) -> None:
    write = fmt.alike(values)
    assert [write(value).replace("\u00a0", " ") for value in values] == written


def test_a_spread_keeps_its_decimals() -> None:
    write = fmt.alike([20.0, 21.0], [0.5, None])
    assert [write(21.0), write(0.5)] == ["21.0", "0.5"]


def test_formats() -> None:
    plain = [
        fmt.si(3660320), fmt.si(331e6, "FLOPs"), fmt.si(12), fmt.percent(0.000157), fmt.change(-0.0348),
        fmt.change(0.0), fmt.ratio(1.617), fmt.duration(177), fmt.duration(3.04), fmt.duration(7500), fmt.count(1e6),
        fmt.duration("x"),
    ]  # fmt: skip
    assert [text.replace("\u00a0", " ") for text in plain] == [
        "3.66 M", "331 MFLOPs", "12.0", "0.0157 %", "−3.48 %", "0 %", "1.62×", "2 min 57 s", "3.0 s", "2 h 05 min",
        "1,000,000", "–",
    ]  # fmt: skip
    assert fmt.ranges([1, 3, 5]) == "1, 3, 5"
    assert fmt.ranges(range(1, 28, 2)) == "1, 3, …, 27"
    assert fmt.ranges([0, 1, 2, 3, 7, 8]) == "0–3, 7, 8"


def test_text_tables(tmp_path: Path) -> None:
    assert number(3660320) == "3.66M"
    assert number([3660320, 3671840]) == "3.66M -> 3.672M"
    assert number(123456.0) == "123.5k"
    assert (
        table(("a", "b"), [{"a": "x", "b": 1.0}, {"a": "long", "b": 10.5}])
        == "a        b\nx        1\nlong  10.5"
    )
    assert list(lines({"a": {"b": 1}, "c": [1, 2, 3]})) == ["a", "  b: 1", "c: 1,2,3"]
    assert results_table(tmp_path) == ""
    found = results_table(make_run(tmp_path / "run")).splitlines()
    assert found[0].split() == ["teacher", "student", "ratio", "better"]
    assert found[1].split() == ["fd", "20", "25", "1.25", "lower"]

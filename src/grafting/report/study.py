"""`write_study`: one self-contained page of a study: table, quality against cost, samples of every row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grafting.errors import GraftError, RunError
from grafting.formats.weights import write_bytes
from grafting.report import images
from grafting.report.format import MISSING, duration, finite, mapping, sequence, si, significant
from grafting.report.html import Child, Column, Html, clean, data_table, document, el, figure, note, section
from grafting.report.page import determinism, environment_table
from grafting.report.plots import Point, drawable, scatter_plot
from grafting.report.style import CSS
from grafting.report.words import plain, protocol_sentence

_PER_ROW = 10


def write_study(folder: Path, study: Mapping[str, Any]) -> Path:
    """Write `study.html` into `folder` and return its path.

    study: {"name", "title", "about", "columns": [{"key", "label"}], "rows": [{"name", "label", one value per column
    key, "std"?: {key: spread}, "samples": path of an .npz (relative to `folder`) or None, "seconds",
    "group"?: rows that a plot joins}],
    "findings": [sentences], "claims"?: [{"text", "verdict", "figures", "paper", "own"?, "why"?}],
    "tables"?: [{"title", "note", "columns", "rows"}], "environment": {name: value}, "scatter": {"x": key, "y": key},
    several of these, or None, "protocol"?: {field: value}, "command"?: how to run it again}.
    Values may be numbers, text or None. Raises RunError where `study` has no rows.
    """
    folder = Path(folder)
    rows = [row for row in sequence(mapping(study).get("rows")) if isinstance(row, Mapping)]
    if not rows:
        raise RunError(
            "a study page needs rows: give study={'rows': [{'label': ..., ...}], 'columns': [...]}"
        )
    title = plain(study.get("title") or study.get("name") or "Study")
    page = document(
        f"{clean(title, 80)} – graft study", CSS, _header(study, title), _claims(study), _tables(study),
        _table(study, rows), _scatter(study, rows), _strips(folder, rows), _provenance(study),
    )  # fmt: skip
    path = folder / "study.html"
    write_bytes(path, page.encode("utf-8"))
    return path


def _header(study: Mapping[str, Any], title: str) -> Html:
    about = study.get("about")
    findings = [plain(item) for item in sequence(study.get("findings"))]
    return el(
        "header", el("p", "Study", class_="kind"), el("h1", title),
        el("p", about, class_="lead") if isinstance(about, str) and about else None,
        el("ul", [el("li", item) for item in findings], class_="findings") if findings else None,
    )  # fmt: skip


def _columns(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [mapping(column) for column in sequence(study.get("columns"))]
    return [(plain(c["key"]), plain(c.get("label", c["key"]))) for c in found if "key" in c]


def _label(row: Mapping[str, Any]) -> str:
    return plain(row.get("label") or row.get("name") or "?")


def _table(study: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> Html:
    columns = _columns(study)
    timed = any(finite(row.get("seconds")) is not None for row in rows) and "seconds" not in dict(columns)
    text = {key for key, _ in columns if any(isinstance(row.get(key), str) for row in rows)}
    body: list[list[Child]] = []
    for row in rows:
        cells: list[Child] = [_label(row), *[_value(row, key) for key, _ in columns]]
        body.append([*cells, duration(row.get("seconds"))] if timed else cells)
    heads = [Column("variant", True), *[Column(label, key in text) for key, label in columns]]
    heads += [Column("wall time")] if timed else []
    protocol = mapping(study.get("protocol"))
    caption = "All variants under one protocol." if protocol else "All variants."
    spread = any(mapping(row.get("std")) for row in rows)
    return section(
        "results", "Results", el("div", data_table(caption, heads, body), class_="named"),
        note("± is the standard deviation over seeds.") if spread else None,
        note("Wall time is of training; what a row took over from others it did not wait for.") if timed else None,
        note(f"Protocol: {protocol_sentence(protocol)}.") if protocol else None,
    )  # fmt: skip


def _value(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None or finite(value) is None:
        return MISSING if value is None or isinstance(value, float) else plain(value)
    if key == "seconds":
        return duration(value)
    if abs(value) >= 1e5:
        return si(value)
    spread = finite(mapping(row.get("std")).get(key))
    return significant(value) if spread is None else f"{significant(value)} ± {significant(spread, 2)}"


def _claims(study: Mapping[str, Any]) -> Html | None:
    """Findings put to the test: what holds, what does not, what noise hides; why the rest is not tested."""
    claims = [mapping(claim) for claim in sequence(study.get("claims"))]
    if not claims:
        return None
    shown = {"verdict": "verdict", "text": "finding", "figures": "distances here", "paper": "paper"}
    if any(claim.get("why") for claim in claims):
        shown["why"] = "why it is not tested"
    own = any(claim.get("own") for claim in claims)
    body: list[list[Child]] = []
    for claim in claims:
        cells: list[Child] = [plain(claim.get(key) or MISSING) for key in shown]
        body.append([*cells, "our own" if claim.get("own") else "the paper's"] if own else cells)
    heads = [Column(label, True) for label in (*shown.values(), *(["whose"] if own else []))]
    return section(
        "claims", "The paper's findings and claims of our own" if own else "The paper's findings",
        data_table("A group in front of < should have the lower distances.", heads, body),
        note(
            "A difference counts where it is larger than two standard deviations of the teacher's own distance over "
            "noise seeds, times the factor where a finding is of a multiple of that distance; every row is one "
            "training seed, unless its name says otherwise."
        ),
    )  # fmt: skip


def _tables(study: Mapping[str, Any]) -> list[Html]:
    """Further tables of a study, each with its own columns."""
    found = []
    for number, item in enumerate(sequence(study.get("tables")), 1):
        table = mapping(item)
        columns = _columns(table)
        rows = [row for row in sequence(table.get("rows")) if isinstance(row, Mapping)]
        text = {key for key, _ in columns if any(isinstance(row.get(key), str) for row in rows)}
        heads = [Column("", True), *[Column(label, key in text) for key, label in columns]]
        body: list[list[Child]] = [[_label(row), *[_value(row, key) for key, _ in columns]] for row in rows]
        title = plain(table.get("title") or "Table")
        said = table.get("note")
        found.append(section(
            f"table-{number}", title, data_table(title, heads, body), note(plain(said)) if said else None,
        ))  # fmt: skip
    return found


def _scatter(study: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> Html | None:
    given = study.get("scatter")
    wanted = [mapping(item) for item in (given if isinstance(given, (list, tuple)) else [given])]
    figures = [found for item in wanted if item and (found := _one_scatter(study, rows, item)) is not None]
    if not figures:
        return None
    plots = el("div", figures, class_="plots") if len(figures) > 1 else figures[0]
    return section("tradeoff", "Quality against cost", plots)


def _one_scatter(
    study: Mapping[str, Any], rows: list[Mapping[str, Any]], wanted: Mapping[str, Any]
) -> Html | None:
    x_key, y_key = plain(wanted.get("x")), plain(wanted.get("y"))
    labels = dict(_columns(study))
    points = [
        Point(plain(row.get("name") or _label(row)) if len(rows) > 12 else _label(row), x, y,
              drawable(mapping(row.get("std")).get(y_key)), plain(row.get("group") or ""))
        for row in rows
        if (x := drawable(row.get(x_key))) is not None and (y := drawable(row.get(y_key))) is not None
    ]  # fmt: skip
    if len({point.x for point in points}) < min(2, len(rows)):
        return None  # nothing was varied there
    x_label, y_label = labels.get(x_key, x_key), labels.get(y_key, y_key)
    described = "; ".join(f"{p.label}: {significant(p.x, 3)}, {significant(p.y, 3)}" for p in points)
    plot = scatter_plot(points, f"{y_label} against {x_label}. {described}", x_label=x_label, y_label=y_label)
    joined = "; rows that differ in the share of layers, the seed or the learning rate alone are joined"
    joined = joined if any(p.group for p in points) else ""
    return figure(plot, f"{y_label} against {x_label}, one point a row{joined}.")


def _strips(folder: Path, rows: list[Mapping[str, Any]]) -> Html | None:
    read: list[tuple[str, images.Samples]] = []
    remarks = []
    for row in rows:
        if not row.get("samples"):
            continue
        try:
            read.append((_label(row), images.read_samples(folder / str(row["samples"]))))
        except (GraftError, OSError, ValueError) as error:
            remarks.append(f"Samples of {_label(row)} could not be read ({error}).")
    if not read:
        return section("samples", "Samples", [note(remark) for remark in remarks]) if remarks else None
    unlike = images.same_noise([file for _, file in read])
    shown = min(_PER_ROW, *(len(file.images) for _, file in read))
    content: list[Child] = []
    for label, file in read:
        uri, width, height = images.strip(file.images[:shown])
        alt = f"The first {shown} samples of {label}"
        content += [el("span", label), el("img", src=uri, width=width, height=height, alt=alt)]
    caption = (
        f"Not the same noise: the files differ in {', '.join(unlike)}."
        if unlike
        else "A column shares its starting noise and its label; these are the first samples, not chosen ones."
    )
    return section(
        "samples",
        "Samples",
        figure(el("div", content, class_="strip"), caption),
        [note(remark) for remark in remarks],
    )


def _provenance(study: Mapping[str, Any]) -> Html:
    command = study.get("command")
    return section(
        "provenance", "What was run on what", environment_table(study.get("environment")),
        el("pre", el("code", plain(command))) if command else None,
        determinism(study.get("environment")),
    )  # fmt: skip

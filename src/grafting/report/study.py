"""`write_study`: one self-contained page of a study: table, quality against cost, samples of every row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grafting.errors import GraftError, RunError
from grafting.formats.weights import write_bytes
from grafting.report import images
from grafting.report.format import MISSING, finite, mapping, sequence, unbroken
from grafting.report.html import Child, Column, Html, clean, data_table, document, el, figure, note, section
from grafting.report.page import determinism, environment_table
from grafting.report.study_plot import tradeoff
from grafting.report.study_table import Rows, cells_of, columns_of, label_of, varied
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
    findings = [unbroken(plain(item)) for item in sequence(study.get("findings"))]
    return el(
        "header", el("p", "Study", class_="kind"), el("h1", title),
        el("p", about, class_="lead") if isinstance(about, str) and about else None,
        el("ul", [el("li", item) for item in findings], class_="findings") if findings else None,
    )  # fmt: skip


def _table(study: Mapping[str, Any], rows: Rows) -> Html:
    columns, same = varied(columns_of(study), rows)
    timed = any(finite(row.get("seconds")) is not None for row in rows) and "seconds" not in dict(columns)
    heads, body = cells_of("variant", [*columns, *([("seconds", "wall time")] if timed else [])], rows)
    protocol = mapping(study.get("protocol"))
    caption = "All variants under one protocol." if protocol else "All variants."
    spread = any(mapping(row.get("std")) for row in rows)
    return section(
        "results", "Results", note(" ".join([caption, *same])),
        data_table(None, heads, body, name="Results", wide=True),
        note("± is the standard deviation over seeds.") if spread else None,
        note("Wall time is of training; what a row took over from others it did not wait for.") if timed else None,
        note(f"Protocol: {protocol_sentence(protocol)}.") if protocol else None,
    )  # fmt: skip


def _claims(study: Mapping[str, Any]) -> Html | None:
    """Findings put to the test: what holds, what does not, what noise hides; why the rest is not tested."""
    claims = [mapping(claim) for claim in sequence(study.get("claims"))]
    if not claims:
        return None
    shown = {"verdict": "verdict", "text": "finding", "figures": "distances here", "paper": "paper"}
    if all(_claimed(claim, "paper") == MISSING for claim in claims):
        del shown["paper"]
    if any(claim.get("why") for claim in claims):
        shown["why"] = "why it is not tested"
    ours = [bool(claim.get("own")) for claim in claims]
    own = any(ours) and not all(ours)
    body: list[list[Child]] = []
    for claim in claims:
        cells: list[Child] = [_claimed(claim, key) for key in shown]
        body.append([*cells, "our own" if claim.get("own") else "the paper's"] if own else cells)
    heads = [Column(label, True) for label in (*shown.values(), *(["whose"] if own else []))]
    return section(
        "claims",
        "Claims" if all(ours) else f"The paper's findings{' and claims of our own' if own else ''}",
        data_table("A group in front of < should have the lower distances.", heads, body),
        note(
            "A difference counts where it is larger than two standard deviations of the teacher's own distance over "
            "noise seeds, times the factor where a finding is of a multiple of that distance; every row is one "
            "training seed, unless its name says otherwise."
        ),
    )  # fmt: skip


def _claimed(claim: Mapping[str, Any], key: str) -> Child:
    said = unbroken(plain(claim.get(key) or MISSING))
    if key == "paper" and not re.search(r"\w", said):
        return MISSING  # the paper gives none of the figures
    if key != "verdict":
        return said
    kind = {"holds": "verdict yes", "does not hold": "verdict no"}.get(said, "verdict")
    return el("span", said, class_=kind)


def _tables(study: Mapping[str, Any]) -> list[Html]:
    """Further tables of a study, each with its own columns."""
    found = []
    for number, item in enumerate(sequence(study.get("tables")), 1):
        table = mapping(item)
        rows = [row for row in sequence(table.get("rows")) if isinstance(row, Mapping)]
        heads, body = cells_of("", columns_of(table), rows)
        title = plain(table.get("title") or "Table")
        said = table.get("note")
        found.append(section(
            f"table-{number}", title, data_table(None, heads, body, name=title),
            note(unbroken(plain(said))) if said else None,
        ))  # fmt: skip
    return found


def _scatter(study: Mapping[str, Any], rows: Rows) -> Html | None:
    given = study.get("scatter")
    wanted = [mapping(item) for item in (given if isinstance(given, (list, tuple)) else [given])]
    figures = [found for item in wanted if item and (found := tradeoff(study, rows, item)) is not None]
    if not figures:
        return None
    plots = el("div", figures, class_="plots") if len(figures) > 1 else figures[0]
    return section("tradeoff", "Quality against cost", plots)


def _strips(folder: Path, rows: Rows) -> Html | None:
    read: list[tuple[str, images.Samples]] = []
    remarks = []
    for row in rows:
        if not row.get("samples"):
            continue
        try:
            read.append((label_of(row), images.read_samples(folder / str(row["samples"]))))
        except (GraftError, OSError, ValueError) as error:
            remarks.append(f"Samples of {label_of(row)} could not be read ({error}).")
    if not read:
        return section("samples", "Samples", [note(remark) for remark in remarks]) if remarks else None
    first = read[0][1]
    unlike = {label: fields for label, file in read if (fields := images.same_noise([first, file]))}
    shown = min(_PER_ROW, *(len(file.images) for _, file in read))
    content: list[Child] = []
    for label, file in read:
        uri, width, height = images.strip(file.images[:shown])
        alt = f"The first {shown} samples of {label}"
        content += [el("span", label), el("img", src=uri, width=width, height=height, alt=alt)]
    caption = (
        "A column shares its starting noise and its label; these are the first samples, not chosen ones."
    )
    if unlike:
        differ = ", ".join(dict.fromkeys(field for fields in unlike.values() for field in fields))
        caption += f" Not the same noise (they differ in {differ}): {'; '.join(unlike)}."
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

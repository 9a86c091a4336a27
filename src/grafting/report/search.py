"""What `graft search` found: rows of a table, sentences, and a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grafting.formats.weights import write_bytes
from grafting.report.drawing import EIGHTH, FIFTH, FOURTH, SEVENTH, SIXTH, STUDENT, TEACHER, THIRD
from grafting.report.format import MISSING, mapping, percent, ranges, sequence, significant
from grafting.report.heatmap import heat_map
from grafting.report.html import Child, Column, Html, data_table, document, el, figure, note, section
from grafting.report.page import environment_table
from grafting.report.plots import Series, legend, line_plot
from grafting.report.style import CSS
from grafting.report.words import operator_label

Found = Mapping[str, Any]
COSTS = {"flops": "FLOPs", "params": "parameters", "latency": "latency"}
_RULES = (THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH)


def search_rows(found: Found) -> list[dict[str, Any]]:
    """Per site, the damage of every candidate alone (1e-4), and what was chosen."""
    chosen = mapping(found["chosen"])["layers"]
    columns = _labels(found)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for candidate in sequence(found["candidates"]):
        target = candidate["replace"]["target"]
        for site in candidate["sites"]:
            row = rows.setdefault(
                (target, site["layer"]),
                {"target": target, "layer": site["layer"], **dict.fromkeys(columns.values()), "chosen": None},
            )
            row[columns[candidate["name"]]] = 1e4 * site["damage"]
            if site["layer"] in chosen.get(candidate["name"], []):
                row["chosen"] = columns[candidate["name"]]
    return [rows[key] for key in sorted(rows)]


def search_remarks(found: Found) -> list[str]:
    """What was chosen, what it costs, and whether the parts add up."""
    chosen, labels = mapping(found["chosen"]), _labels(found)
    what = "; ".join(f"{labels[name]} in {ranges(layers)}" for name, layers in chosen["layers"].items())
    said = [
        f"Chosen: {what or 'nothing'}: {chosen['replaced']} operators, {percent(chosen['cost'])} of the "
        f"{COSTS[found['by']]}.",
        f"Damage {significant(1e4 * chosen['together'], 3)}e-4, all together; "
        f"{significant(1e4 * chosen['damage'], 3)}e-4 by adding up what each does alone.",
    ]
    better = [
        rule for rule in sequence(found["rules"])
        if rule["together"] < chosen["together"] and rule["replaced"] >= chosen["replaced"]
        and rule["cost"] <= chosen["cost"] + 1e-9
    ]  # fmt: skip
    if better:
        rule = min(better, key=lambda r: r["together"])
        said.append(
            f"{labels[rule['candidate']]} in {rule['rule']} does less damage together "
            f"({significant(1e4 * rule['together'], 3)}e-4): damages do not add up here; take that."
        )
    return said


def write_search(path: str | Path, found: Found) -> Path:
    """Write what `search_plan` returned as one HTML page; returns its path. Raises CheckpointError."""
    remarks = search_remarks(found)
    page = document(
        "Search – graft", CSS,
        el("header", el("p", "Search", class_="kind"), el("h1", f"What {_name(found)} can do without"),
           [el("p", text, class_="lead") for text in remarks]),
        _sites(found), _curve(found), _rules(found), _provenance(found),
    )  # fmt: skip
    path = Path(path)
    write_bytes(path, page.encode("utf-8"))
    return path


def _name(found: Found) -> str:
    """The model without the folders that hold it."""
    return str(found.get("model")).rstrip("/").rpartition("/")[2]


def _labels(found: Found) -> dict[str, str]:
    """A name for each candidate that tells it from the others."""
    names: dict[str, str] = {}
    for candidate in sequence(found["candidates"]):
        given = candidate["replace"]["with"]
        operator, config = next(iter(given.items())) if isinstance(given, Mapping) else (given, {})
        label = f"{candidate['replace']['target']}: {operator_label(operator, config)}"
        number = candidate["name"].partition("-")[0]
        names[candidate["name"]] = f"{label} ({number})" if label in names.values() else label
    return names


def _sites(found: Found) -> Html:
    rows, labels = search_rows(found), list(_labels(found).values())
    values = [[row[label] for label in labels] for row in rows]
    names = [f"{row['target']} {row['layer']}" for row in rows]
    caption = "Damage of each candidate alone, in 1e-4; logarithmic colour."
    drawn = heat_map(
        values, caption, rows=names, columns=[str(n) for n in range(1, len(labels) + 1)], row_label="site",
        column_label="candidate", log=True, show=lambda value: significant(value, 2),
    )  # fmt: skip
    heads = [Column("site", True), *[Column(f"{n}. {label}") for n, label in enumerate(labels, 1)],
             Column("chosen", True)]  # fmt: skip
    body: list[list[Child]] = [
        [name, *[MISSING if v is None else significant(v, 3) for v in line], row["chosen"] or "as it was"]
        for name, line, row in zip(names, values, rows, strict=True)
    ]
    return section(
        "sites", "What each site can do without",
        el("p", "A candidate's damage at a site: the squared difference of the model's prediction to what it was, when "
           "this one operator is replaced, after stage 1."),
        figure(drawn, caption) if drawn is not None else None,
        data_table("Damage in 1e-4, by site; candidates with their numbers in the map.", heads, body),
    )  # fmt: skip


def _curve(found: Found) -> Html:
    by_cost = found["budget"] is not None
    points = [mapping(point) for point in sequence(found["curve"])]
    rules = [mapping(rule) for rule in sequence(found["rules"])]

    def line(label: str, members: Sequence[Mapping[str, Any]], key: str, **style: Any) -> Series:
        seen = [p for p in members if p[key] > 0]  # the axis is logarithmic
        xs = [100 * p["cost"] if by_cost else p["replaced"] for p in seen]
        return Series(label, xs, [1e4 * p[key] for p in seen], **style)

    lines = [
        line("best choice, all together", points, "together", color=STUDENT, dots=True),
        line("added up", points, "damage", color=TEACHER, dashed=True),
        *[
            line(f"{label}, by rule", [r for r in rules if r["candidate"] == name], "together", color=color, dots=True)
            for (name, label), color in zip(_labels(found).items(), _RULES, strict=False)
        ],
    ]  # fmt: skip
    lines = [lines[0], *(each for each in lines[1:] if each.x)]
    x = f"{COSTS[found['by']]}, % of the model's" if by_cost else "operators replaced"
    described = "; ".join(
        f"{significant(a, 3)}: {significant(b, 3)}" for a, b in zip(lines[0].x, lines[0].y, strict=True)
    )
    plot = line_plot(lines, f"Damage by {x}. {described}", x_label=x, y_label="damage, 1e-4", log_y=True)
    columns = [
        *([Column(x)] if by_cost else []), Column("operators replaced"), Column("together, 1e-4"),
        Column("added up, 1e-4"), Column("plan", True),
    ]  # fmt: skip
    labels = _labels(found)
    body: list[list[Child]] = [
        [
            *([percent(p["cost"])] if by_cost else []), p["replaced"], significant(1e4 * p["together"], 3),
            significant(1e4 * p["damage"], 3),
            "; ".join(f"{labels[name]} in {ranges(layers)}" for name, layers in p["layers"].items()) or "no edit",
        ]
        for p in points
    ]  # fmt: skip
    return section(
        "curve",
        "How far one can go",
        figure(
            [plot, legend(lines)],
            "Damage of the best choice, before stage 2, against its aim; beside it what the "
            "selectors interleaved-50, interleaved-75 and all do with a candidate.",
        ),
        data_table("The best choices.", columns, body),
    )


def _rules(found: Found) -> Html | None:
    rules, labels = [mapping(rule) for rule in sequence(found["rules"])], _labels(found)
    if not rules:
        return None
    columns = [Column("rule", True), Column("candidate", True), Column("replaced"), Column(COSTS[found["by"]]),
               Column("together, 1e-4")]  # fmt: skip
    body: list[list[Child]] = [
        [
            r["rule"],
            labels[r["candidate"]],
            r["replaced"],
            percent(r["cost"]),
            significant(1e4 * r["together"], 3),
        ]
        for r in rules
    ]
    return section(
        "rules", "What rules would have done", data_table("Selectors, all together.", columns, body)
    )


def _provenance(found: Found) -> Html:
    protocol = mapping(found.get("protocol"))
    return section(
        "provenance", "How it was measured",
        el("p", f"{protocol.get('num_samples')} noised samples of {protocol.get('data')}, timesteps spread evenly, "
           f"seed {protocol.get('seed')}. Stage 2 of the choice: graft run recipe.yaml of this folder."),
        note("Damage is before stage 2, which repairs a part of it: it orders choices, it is no measure of quality."),
        environment_table(found.get("environment")),
    )  # fmt: skip

"""The sections on what came out: headline, quality, layers."""

from __future__ import annotations

import json

from grafting.report import words
from grafting.report.format import (
    MISSING,
    change,
    count,
    duration,
    finite,
    mapping,
    pair,
    percent,
    ratio,
    relative,
    sequence,
    si,
    significant,
)
from grafting.report.html import Child, Column, Html, data_table, el, note, section
from grafting.report.reading import STAGES, RunRecord

_TEXT = True


def headline(run: RunRecord) -> Html:
    """What was edited, and the figures that matter."""
    about = run.recipe.get("about")
    missing = [
        stage
        for stage in STAGES
        if not run.stage(stage)
        and (run.recipe[stage] is not None if stage in run.recipe else stage != "synthesize")
    ]
    return el(
        "header",
        el("p", "Graft run", class_="kind"),
        el("h1", run.name),
        el("p", words.sentence(run), class_="lead"),
        el("p", about) if isinstance(about, str) and about else None,
        el("p", f"This run is not complete: {', '.join(missing)} not done.", class_="warn")
        if missing
        else None,
        [el("p", problem, class_="warn") for problem in run.problems],
        el("dl", [_key(*item) for item in _key_figures(run)], class_="keys"),
        layer_map(run),
    )


def _key(label: str, value: str, remark: str) -> Html:
    return el("div", el("dt", label), el("dd", value, class_="big"), el("dd", remark), class_="key")


def _key_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    found = words.measures(run)
    name = next((n for n in words.HEADLINE_MEASURES if n in found), next(iter(found), None))
    if name is None:
        quality = ("Quality", MISSING, "not evaluated")
    else:
        teacher, student, quotient = found[name]
        label, higher = words.MEASURES.get(name, (name, None))
        direction = {True: " (higher is better)", False: " (lower is better)", None: ""}[higher]
        accuracy = found.get("label_accuracy", (None, None, None))[2]
        other = f"; label accuracy {ratio(accuracy)}" if accuracy is not None else ""
        quality = (
            f"{label[:1].upper()}{label[1:]} ratio", ratio(quotient),
            f"{significant(teacher)} → {significant(student)}{direction}{other}",
        )  # fmt: skip
    model = mapping(run.stage("graft").get("model"))
    flops, params = pair(model.get("flops_per_image")), pair(model.get("params"))
    cost = (
        "FLOPs per image", change(relative(*flops)),
        f"{si(flops[0])} → {si(flops[1])}; parameters {change(relative(*params))}",
    ) if model else ("FLOPs per image", MISSING, "the graft stage is not done")  # fmt: skip
    stages = words.stage_costs(run)
    total = words.total_cost(stages)
    spent = (
        "Cost of the edit", percent(total.share),
        f"of the pretraining FLOPs: {si(total.flops, 'FLOPs')}, teacher passes included; "
        f"{count(total.visits)} image visits",
    ) if stages else ("Cost of the edit", MISSING, "no training stage is done")  # fmt: skip
    each = " + ".join(f"{words.STAGE_NAMES[s.name].split(',')[0]}: {duration(s.seconds)}" for s in stages)
    time = ("Wall time of training", duration(total.seconds), each or "no training stage is done")
    return [quality, cost, spent, time]


def layer_map(run: RunRecord) -> Html | None:
    """A row of cells per swap: which blocks have a new operator."""
    num_layers = run.stage("graft").get("num_layers")
    if not isinstance(num_layers, int) or not 0 < num_layers <= 200 or not run.edits:
        return None
    rows = []
    for swap in words.swaps(run.edits):
        new = set(swap.layers)
        cells = [el("td", "●", class_="new") if i in new else el("td", "·") for i in range(num_layers)]
        rows.append(el("tr", el("th", swap.became, scope="row"), cells))
    head = el("tr", el("th", "block", scope="col"), [el("th", i, scope="col") for i in range(num_layers)])
    return el(
        "div", el("table", el("caption", "Which blocks have a new operator."),
                  el("thead", head), el("tbody", rows), class_="cells"),
        class_="scroll", role="region", tabindex=0, aria_label="Which blocks have a new operator",
    )  # fmt: skip


def quality(run: RunRecord) -> Html:
    """Teacher, student and ratio, with the protocol under them."""
    title, ident = "Quality", "quality"
    found = words.measures(run)
    if not found:
        return section(ident, title, note("Not evaluated yet: the run folder has no evaluation.json."))
    rows: list[list[Child]] = []
    for name, (teacher, student, quotient) in found.items():
        label, higher = words.MEASURES.get(name, (name, None))
        better = {True: "higher", False: "lower", None: MISSING}[higher]
        rows.append([label, significant(teacher), significant(student), ratio(quotient), better])
    columns = [
        Column("measure", _TEXT),
        Column("teacher"),
        Column("student"),
        Column("student / teacher"),
        Column("better", _TEXT),
    ]
    protocol = words.protocol(run)
    differs = mapping((mapping(run.evaluation.get("comparison")) or run.stage("evaluate")).get("differs"))
    unlike = [
        f"{key} ({', '.join(map(words.plain, sequence(value)))})"
        for key, value in differs.items()
        if key != "model"
    ]
    num = finite(protocol.get("num_samples"))
    return section(
        ident, title, data_table("Quality of the samples under one protocol.", columns, rows),
        note("Protocol: ", words.protocol_sentence(protocol), ".") if protocol else None,
        note("Differs between the two: ", ", ".join(unlike), ".") if unlike else None,
        note(f"With {count(num)} samples a Fréchet distance is noisy and biased upwards for both models: compare it, "
             "and the ratio, only with runs of as many samples.") if num is not None and num < 5000 else None,
    )  # fmt: skip


def layers(run: RunRecord) -> Html:
    """Per layer, what became what."""
    title, ident = "Layer by layer", "layers"
    if not run.edits:
        return section(ident, title, note("The run folder lists no edits."))
    rows: list[list[Child]] = []
    for edit in run.edits:
        params, flops = pair(edit.get("params")), pair(edit.get("flops"))
        config, target = mapping(edit.get("config")), words.plain(edit.get("target", "?"))
        rows.append([
            words.plain(edit.get("path", "?")), words.TARGETS.get(target, target),
            words.arrow(words.plain(edit.get("from", "?")), words.plain(edit.get("to", "?"))),
            ", ".join(f"{k} {words.plain(v)}" for k, v in config.items()) or "defaults",
            words.plain(edit.get("init", MISSING)),
            words.arrow(count(params[0]), count(params[1])),
            words.arrow(si(flops[0]), si(flops[1])), change(relative(*flops)),
        ])  # fmt: skip
    columns = [Column(name, _TEXT) for name in ("operator", "target", "became", "settings", "start")]
    columns += [Column("parameters"), Column("FLOPs per image"), Column("change")]
    num = run.stage("graft").get("num_layers")
    held = [sequence(edit.get("layers")) or [edit.get("layer")] for edit in run.edits]
    edited = {json.dumps(layer, default=str) for layers in held for layer in layers}
    kept = (
        f" {num - len(edited)} of {num} blocks are untouched."
        if isinstance(num, int) and num >= len(edited)
        else ""
    )
    return section(ident, title, data_table(f"Every operator that was replaced.{kept}", columns, rows))

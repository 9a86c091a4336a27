"""The section on cost: what the edit changes per image, and what making it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    ranges,
    relative,
    si,
)
from grafting.report.html import Child, Column, Html, data_table, el, note, section
from grafting.report.reading import RunRecord

_TEXT = True


def cost(run: RunRecord) -> Html:
    """What the edit changes per image, and what making it cost."""
    graft = run.stage("graft")
    parts: list[Child] = []
    if graft:
        parts += [_model_table(mapping(graft.get("model"))), _target_table(run, graft.get("num_layers"))]
    else:
        parts.append(note("The graft stage is not done: no counts of parameters and FLOPs."))
    parts.append(_training_table(run))
    return section("cost", "Cost", parts)


def _model_table(model: Mapping[str, Any]) -> Html:
    rows: list[list[Child]] = []
    for key, label, unit in (
        ("params", "parameters", ""),
        ("flops_per_image", "FLOPs per image, one forward pass", "FLOPs"),
    ):
        before, after = pair(model.get(key))
        rows.append([label, si(before, unit), si(after, unit), change(relative(before, after))])
    columns = [Column("whole model", _TEXT), Column("teacher"), Column("student"), Column("change")]
    return data_table("The model before and after. Two FLOPs per multiply-add.", columns, rows)


def _target_table(run: RunRecord, num_layers: Any) -> Html | None:
    """As Table 4 of arXiv 2506.05340 counts: changes in per cent of all operators of the target in the model."""
    rows: list[list[Child]] = []
    split = any("operator_flops" in edit for edit in run.edits)
    for swap in words.swaps(run.edits):
        share = len(swap.layers) / num_layers if isinstance(num_layers, int) and num_layers > 0 else None
        changes = [
            _of_target(swap, key, num_layers)
            for key in ("operator_flops", "featurizer_flops", "flops", "params")
        ]
        rows.append([
            swap.became, ranges(swap.layers),
            f"{100 * share:.3g} %" if share is not None else MISSING,
            *[change(value) if value is not None else MISSING for value in (changes if split else changes[2:])],
        ])  # fmt: skip
    if not rows:
        return None
    columns = [Column("target and operator", _TEXT), Column("blocks", _TEXT), Column("of all blocks")]
    columns += [Column("operator FLOPs"), Column("projection FLOPs")] if split else []
    columns += [Column("FLOPs"), Column("parameters")]
    return data_table("Changes in per cent of all operators of that target in the teacher.", columns, rows)


def _of_target(swap: words.Swap, key: str, num_layers: Any) -> float | None:
    pairs = [pair(edit.get(key)) for edit in swap.edits]
    if any(a is None or b is None for a, b in pairs) or not isinstance(num_layers, int) or num_layers < 1:
        return None
    before = sum(a for a, _ in pairs if a is not None)
    total = (
        before / max(1, len(swap.layers)) * num_layers
    )  # the blocks that keep their operator have one like those that lost it
    return (sum(b for _, b in pairs if b is not None) - before) / total if total else None


def _training_table(run: RunRecord) -> Html:
    stages = words.stage_costs(run)
    if not stages:
        return note("No training stage is done: the edit has cost nothing yet.")
    rows = []
    for c in [*stages, *([words.total_cost(stages)] if len(stages) > 1 else [])]:
        rows.append([
            words.STAGE_NAMES.get(c.name, c.name), count(c.steps), count(c.visits), si(c.flops, "FLOPs"),
            si(c.teacher_flops, "FLOPs") if c.teacher_flops != 0 else "0", percent(c.share), duration(c.seconds),
        ])  # fmt: skip
    columns = [Column("training", _TEXT), *map(Column, (
        "steps", "image visits", "FLOPs", "of which teacher", "of pretraining", "wall time"))]  # fmt: skip
    pretraining = next(
        (f for s in ("finetune", "distill") if (f := finite(run.stage(s).get("pretraining_flops")))), None
    )
    remark = (
        f"The teacher's pretraining took {si(pretraining, 'FLOPs')}, counted as three forward passes for every "
        "image visit. The cost of the edit counts the teacher's pass of every training step; passes on held-out "
        "samples are measurement and not in it."
        if pretraining
        else "What the teacher's pretraining took is not known; `pretraining: {image_visits: N}` in the recipe says it."
    )
    sampling = mapping(run.stage("sample").get("seconds"))
    spent = ", ".join(
        f"{who} {duration(sampling.get(who))}" for who in ("teacher", "student") if who in sampling
    )
    made = run.stage("synthesize")
    pairs = (
        f"The data are {count(finite(made.get('num')))} pairs that the teacher sampled itself, in "
        f"{duration(finite(made.get('seconds')))}, which is not counted; no other data was trained on."
    )
    return el(
        "div", data_table("What the edit cost to make.", columns, rows, total=len(rows) > 1), note(remark),
        note(pairs) if made else None,
        note(f"Sampling took: {spent}. It is not part of the edit, and one timing is no benchmark.") if spent else None,
    )  # fmt: skip

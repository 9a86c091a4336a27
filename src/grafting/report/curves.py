"""The sections on how it was trained: stage 1 per operator, stage 2 as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grafting.report import words
from grafting.report.drawing import AXIS, FOURTH, STUDENT, TEACHER, THIRD
from grafting.report.format import MISSING, count, finite, mapping, significant
from grafting.report.html import Child, Column, Html, data_table, el, figure, note, section
from grafting.report.plots import Series, legend, line_plot, points_of, ramp, spikes
from grafting.report.reading import RunRecord

_STARTS = ("random", "copied", "fitted")
_TERM_COLORS = (TEACHER, THIRD, FOURTH, AXIS)


def stage_one(run: RunRecord) -> Html:
    """Loss and held-out error of every operator, and where each started and ended."""
    title, ident = "Stage 1: each new operator learns its donor's outputs", "stage-1"
    steps, checks = run.records("distill"), run.records("distill", "validation")
    result = run.stage("distill")
    if not (steps or checks or result):
        skipped = "distill" in run.recipe and run.recipe["distill"] is None
        return section(ident, title, note("The recipe leaves it out." if skipped else "Not begun."))
    starts = mapping(result.get("start_error")) or _logged_start(run)
    paths = _paths(run, starts, steps, checks)
    parts: list[Child] = []
    for name, members in _groups(run, paths):
        colors = {path: ramp(i, len(members)) for i, path in enumerate(members)}
        loss = _per_path(members, colors, [(r.get("step"), mapping(r.get("loss"))) for r in steps])
        first = {path: error for start in _STARTS for path, error in mapping(starts.get(start)).items()}
        held = _per_path(
            members,
            colors,
            [(0, first), *((r.get("step"), mapping(r.get("error"))) for r in checks)],
            dots=True,
        )
        plots = []
        if loss:
            jumps = sorted({line.x[i] for line in loss for i in line.marks})
            caption = (
                f"Training loss ({_loss_name(run, members)}), mean of the steps since the point before. "
                f"{_spike_words(range(len(jumps)), jumps)}"
            )
            plots.append(_curves(loss, "training loss", caption, log_y=True))
        if held:
            caption = "Held-out error: mean |student − donor| over mean |donor|, on the donor's own inputs."
            plots.append(_curves(held, "relative error", caption))
        if plots:
            parts += [el("h3", name), el("div", plots, class_="plots"), legend(loss or held)]
    if not result:
        parts.insert(0, note("Stage 1 is not finished."))
    return section(ident, title, parts, _error_table(run, paths, starts, result))


def _error_table(
    run: RunRecord, paths: Sequence[str], starts: Mapping[str, Any], result: Mapping[str, Any]
) -> Html | None:
    final, best, rested = (mapping(result.get(key)) for key in ("final_error", "best_step", "rested"))
    if not paths or not (starts or final):
        return None
    known = [start for start in _STARTS if mapping(starts.get(start))]
    losses = mapping(result.get("losses"))
    became = {
        words.plain(e.get("path")): words.operator_label(words.plain(e.get("to")), mapping(e.get("config")))
        for e in run.edits
    }
    rows: list[list[Child]] = []
    for path in paths:
        rows.append([
            path, became.get(path, MISSING), *([words.plain(losses.get(path, MISSING)).upper()] if losses else []),
            *[significant(mapping(starts[start]).get(path), 3) for start in known],
            significant(final.get(path), 3), count(best.get(path)), count(rested[path]) if path in rested else MISSING,
        ])  # fmt: skip
    if len(paths) > 1:
        rows.append(
            [
                "mean",
                "",
                *([""] if losses else []),
                *[_mean(mapping(starts[start]), paths) for start in known],
                _mean(final, paths),
                "",
                "",
            ]
        )
    columns = [
        Column("operator", True),
        Column("now", True),
        *([Column("loss", True)] if losses else []),
        *[Column(f"step 0, {start}") for start in known],
    ]
    columns += [Column("end"), Column("best step"), Column("rested at")]
    return el(
        "div", data_table("Held-out relative error at step 0 by way of starting, and at the end.",
                          columns, rows, total=len(paths) > 1),
        note("Random: drawn weights. Copied: what the donor's weights can give. Fitted: the output projection solved "
             "in closed form on one calibration batch. An operator rests when its held-out error has stopped falling."),
    )  # fmt: skip


def stage_two(run: RunRecord) -> Html:
    """Loss and its terms, held-out loss, learning rate; spikes are marked."""
    title, ident = "Stage 2: the whole model is finetuned", "stage-2"
    steps, result = run.records("finetune"), run.stage("finetune")
    checks = [(r.get("step"), r.get("loss")) for r in run.records("finetune", "validation")]
    if not checks:
        checks = [(_number(step), loss) for step, loss in mapping(result.get("validation")).items()]
    if not (steps or checks or result):
        skipped = "finetune" in run.recipe and run.recipe["finetune"] is None
        return section(ident, title, note("The recipe leaves it out." if skipped else "Not begun."))
    x, y = points_of([(r.get("step"), r.get("loss")) for r in steps])
    jumps = spikes(y)
    lines = [Series("loss", x, y, STUDENT, marks=jumps)] if y else []
    weights = mapping(run.settings("finetune").get("objectives"))
    names = list(dict.fromkeys(str(name) for r in steps for name in mapping(r.get("terms"))))[
        : len(_TERM_COLORS)
    ]
    for name, color in zip(names, _TERM_COLORS, strict=False):
        tx, ty = points_of([(r.get("step"), mapping(r.get("terms")).get(name)) for r in steps])
        if ty and (len(names) > 1 or ty != y):
            weight = finite(weights.get(name))
            label = f"{name}, weight {weight:g}" if weight is not None else name
            lines.append(Series(label, tx, ty, color, dashed=True, faint=True))
    plots: list[Child] = []
    if lines:
        terms = " and its unweighted terms" if len(lines) > 1 else ""
        caption = f"Training loss{terms}. {_spike_words(jumps, x)}"
        plots.append(_curves(lines, "loss", caption, log_y=True, listed=True))
    singles = (
        ("held-out loss", checks, STUDENT,
         "Held-out diffusion loss of the averaged weights, on the same images, timesteps and noise."),
        ("learning rate", [(r.get("step"), r.get("lr")) for r in steps], AXIS, "Learning rate."),
        ("gradient norm", [(r.get("step"), r.get("grad_norm")) for r in steps], THIRD, "Gradient norm, unclipped."),
    )  # fmt: skip
    for name, pairs, color, caption in singles:
        xs, ys = points_of(pairs)
        if ys:
            line = Series(name, xs, ys, color, dots=name == "held-out loss")
            plots.append(
                _curves([line], name, caption, log_y=name == "gradient norm", tall=name == "held-out loss")
            )
    facts = []
    if result:
        if finite(result.get("trained_params")) is not None:
            facts.append(f"{count(result.get('trained_params'))} parameters were trained")
        if finite(result.get("ema_decay")) is not None:
            facts.append(f"the decay of the weight average was {significant(result.get('ema_decay'))}")
        if finite(result.get("skipped_steps")) is not None:
            facts.append(f"{count(result.get('skipped_steps'))} steps with non-finite gradients were skipped")
    text = "; ".join(facts)
    return section(
        ident, title, None if result else note("Stage 2 is not finished."), el("div", plots, class_="plots"),
        note(f"{text[0].upper()}{text[1:]}.") if text else None,
    )  # fmt: skip


def _curves(
    series: Sequence[Series], y_label: str, caption: str, *,
    log_y: bool = False, tall: bool = True, listed: bool = False,
) -> Html:  # fmt: skip
    """A figure of lines over steps, told to those who can't see it by where the lines begin and end."""
    what = f"{len(series)} lines" if len(series) > 1 and not listed else series[0].label
    ends = _ends(series[:1] if listed else series)
    drawn = line_plot(
        series, f"{y_label} over steps: {what}, {ends}", y_label=y_label, log_y=log_y, tall=tall
    )
    return figure([drawn, legend(series)] if listed and len(series) > 1 else drawn, caption)


def _spike_words(jumps: Sequence[int], x: Sequence[float]) -> str:
    if not jumps:
        return "No loss spikes."
    where = ", ".join(count(x[i]) for i in jumps[:6]) + (", …" if len(jumps) > 6 else "")
    found = "1 loss spike" if len(jumps) == 1 else f"{len(jumps)} loss spikes"
    return f"{found} (circled) at step {where}: far above the median of the 20 points before."


def _groups(run: RunRecord, paths: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Paths by what replaced what; at most six groups are apart, the others are one."""
    found: list[tuple[str, list[str]]] = []
    left = list(paths)
    for swap in words.swaps(run.edits)[:6]:
        members = [p for p in left if p in {words.plain(edit.get("path")) for edit in swap.edits}]
        left = [p for p in left if p not in members]
        if members:
            found.append((swap.became, members))
    return [*found, ("operators", left)] if left else found


def _paths(
    run: RunRecord,
    starts: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
) -> list[str]:
    trained = {str(path) for start in starts.values() for path in mapping(start)}
    for key, records in (("loss", steps[:1]), ("error", checks[:1])):
        trained |= {str(path) for record in records for path in mapping(record.get(key))}
    ordered = [path for edit in run.edits if (path := words.plain(edit.get("path"))) in trained]
    return list(dict.fromkeys([*ordered, *sorted(trained - set(ordered))]))[:400]


def _per_path(
    paths: Sequence[str],
    colors: Mapping[str, str],
    records: Sequence[tuple[Any, Mapping[str, Any]]],
    dots: bool = False,
) -> list[Series]:
    found = []
    for path in paths:
        x, y = points_of([(step, values.get(path)) for step, values in records])
        if y:
            found.append(Series(path, x, y, colors[path], dots=dots, marks=[] if dots else spikes(y)))
    return found


def _logged_start(run: RunRecord) -> Mapping[str, Any]:
    return next((mapping(r.get("error")) for r in run.records("distill", "start")), {})


def _loss_name(run: RunRecord, paths: Sequence[str]) -> str:
    """The loss of a group as it was chosen, or as the recipe says."""
    chosen = mapping(run.stage("distill").get("losses"))
    if found := {words.plain(chosen[path]).upper() for path in paths if path in chosen}:
        return ", ".join(sorted(found))
    losses = mapping(run.settings("distill").get("losses"))
    targets = {words.plain(e.get("target")) for e in run.edits if words.plain(e.get("path")) in set(paths)}
    named = {words.plain(losses[t]).upper() for t in targets if t in losses}
    return ", ".join(sorted(named)) if named else "as the plan says"


def _ends(series: Sequence[Series]) -> str:
    first, last = [s.y[0] for s in series], [s.y[-1] for s in series]
    if len(series) == 1:
        return f"from {significant(first[0], 3)} to {significant(last[0], 3)}."
    return (
        f"first {significant(min(first), 3)} to {significant(max(first), 3)}, "
        f"last {significant(min(last), 3)} to {significant(max(last), 3)}."
    )


def _mean(values: Mapping[str, Any], paths: Sequence[str]) -> str:
    known = [v for path in paths if (v := finite(values.get(path))) is not None]
    return significant(sum(known) / len(known), 3) if known else MISSING


def _number(text: Any) -> float | None:
    try:
        return finite(float(text))
    except (TypeError, ValueError):
        return None

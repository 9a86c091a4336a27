"""Stage 1 of a row: distill the operators that no row has distilled yet, take over the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from grafting.errors import DivergedError, GraftError
from grafting.families import family_of
from grafting.formats import weights
from grafting.pipeline import Pipeline
from grafting.plain import canonical_json
from grafting.plan import GraftPlan, Replace
from grafting.studies.shelf import Shelf, Shelved, operator_keys, plan_key
from grafting.surgery import Edit, explain, graft
from grafting.training.config import DistillConfig, seeded
from grafting.training.distillation import distill
from grafting.training.loop import Interrupted
from grafting.training.results import DistillResult

STAGE = "distill"
_TODO = "stage-1.json"  # in the row's folder: what it distills itself, so that a resumed row trains the same


def shared_stage_1(pipeline: Pipeline, shelf: Shelf, others: Sequence[GraftPlan] = ()) -> None:
    """Do stage 1 of a row, with every operator that is on the shelf taken from there, and put the rest on it.

    Leaves what `Pipeline.distill` would: the same weights, result and log (seconds are those of each operator's share
    of the pass that it was trained in). A recipe that leaves its losses to a measurement is distilled whole.
    others: plans of rows that come later and are the same up to the end of stage 1. Where they put an operator of this
    row into more layers, these are distilled in the same pass of the teacher.
    """
    run, recipe = pipeline.run, pipeline.recipe
    if recipe.distill is None or run.result(STAGE) is not None:
        return
    if run.result("graft") is None:
        pipeline.graft()
    config = seeded(recipe.distill, recipe.seed)
    said = explain(pipeline.teacher, recipe.graft_plan, recipe.locality)
    edits = said.edits
    if said.groups or said.pruned:
        _whole(pipeline, config, said.plan, shelf)
        return
    keys = _keys(pipeline, config, edits)
    if keys is None:
        pipeline.distill()
        return
    with run.writing(STAGE):
        _fill(pipeline, config, edits, keys, shelf, others)


def _keys(pipeline: Pipeline, config: DistillConfig, edits: Iterable[Edit]) -> dict[str, str] | None:
    return operator_keys(
        edits, pipeline.teacher, config, seed=pipeline.recipe.seed, data_hash=pipeline.data.content_hash,
        device=pipeline.device, precision=_precision(pipeline, config),
    )  # fmt: skip


def _whole(pipeline: Pipeline, config: DistillConfig, plan: GraftPlan, shelf: Shelf) -> None:
    """A plan that edits the depth is distilled as a whole; another row with the same stage 1 takes over the student."""
    run = pipeline.run
    key = plan_key(
        plan, pipeline.teacher, config, seed=pipeline.recipe.seed, data_hash=pipeline.data.content_hash,
        device=pipeline.device, precision=_precision(pipeline, config),
    )  # fmt: skip
    known = shelf.get(key)
    if known is None:
        result = pipeline.distill()
        log = [line for line in run.metrics() if line.get("stage") == STAGE]
        shelf.put(key, pipeline.student().state_dict(), {"result": result, "log": log})
        return
    with run.writing(STAGE):
        run.bind("data", pipeline.data.name, pipeline.data.content_hash)
        student = pipeline.student()
        student.load_state_dict(dict(known.state))
        run.save_student(student)
        text = "".join(json.dumps(line) + "\n" for line in known.record["log"])
        weights.write_bytes(run.path / "metrics.jsonl", text.encode())
        run.finish(STAGE, dict(known.record["result"]) | {"taken_over": True})


def _fill(
    pipeline: Pipeline, config: DistillConfig, edits: tuple[Edit, ...], keys: Mapping[str, str], shelf: Shelf,
    others: Sequence[GraftPlan],
) -> None:  # fmt: skip
    """Distill what is not on the shelf, put together the student, finish the stage."""
    run = pipeline.run
    run.bind("data", pipeline.data.name, pipeline.data.content_hash)
    todo, more = _todo(pipeline, config, edits, keys, shelf, others)
    if todo:
        own = [edit for edit in edits if edit.site.path in todo]
        try:
            _distill(pipeline, config, [*own, *more], shelf)
        except DivergedError:
            if not more:
                raise
            run.console.say("stage 1 diverged: once more, without the operators of other rows")
            shutil.rmtree(run.path / "checkpoints" / STAGE, ignore_errors=True)
            _note(pipeline, todo, [])
            _distill(pipeline, config, own, shelf)
    found = {path: shelf.get(key) for path, key in keys.items()}
    shelved = {path: item for path, item in found.items() if item is not None}
    student = pipeline.student()
    for path, item in shelved.items():
        student.get_submodule(path).load_state_dict(dict(item.state))
    run.save_student(student)
    if len(todo) < len(shelved) or more:
        lines = _merged_lines(item.record["log"] for item in shelved.values())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        weights.write_bytes(run.path / "metrics.jsonl", text.encode())
    result = _result(pipeline, config, edits, shelved).to_dict()
    result |= pipeline.share_of_pretraining(result["flops"])
    run.finish(STAGE, result | {"taken_over": sorted(set(shelved) - set(todo))})


def _precision(pipeline: Pipeline, config: DistillConfig) -> str:
    from grafting.training.compute import make_compute

    return make_compute(pipeline.compute.device, config.precision).precision


def _todo(
    pipeline: Pipeline, config: DistillConfig, edits: tuple[Edit, ...], keys: Mapping[str, str], shelf: Shelf,
    others: Sequence[GraftPlan],
) -> tuple[list[str], list[Edit]]:  # fmt: skip
    """The sites that this row distills for itself, and what it distills for other rows: decided once."""
    path = pipeline.run.path / _TODO
    if path.is_file() and any((pipeline.run.path / "checkpoints" / STAGE).glob("*.pt")):
        known = weights.read_json(path, "stage 1")
        entries = known.get("besides")
        plan = GraftPlan.from_dict(entries) if entries else None
        return list(known.get("distills", [])), list(_edits(pipeline, plan))
    todo = [site for site, key in keys.items() if not shelf.has(key)]
    more = _of_others(pipeline, config, edits, shelf, others) if todo else []
    _note(pipeline, todo, more)
    return todo, more


def _note(pipeline: Pipeline, todo: list[str], more: list[Edit]) -> None:
    besides = [_alone(edit).to_dict() for edit in more]
    weights.write_json(pipeline.run.path / _TODO, {"distills": todo, "besides": besides})


def _of_others(
    pipeline: Pipeline, config: DistillConfig, edits: tuple[Edit, ...], shelf: Shelf, others: Sequence[GraftPlan]
) -> list[Edit]:  # fmt: skip
    """Operators of this row's kinds in layers where other rows alone have them, that nobody has distilled yet."""
    kinds = {_kind(edit) for edit in edits}
    taken = {edit.site.path for edit in edits}
    found: dict[str, Edit] = {}
    for edit in (edit for plan in others for edit in _edits(pipeline, plan, lenient=True)):
        if edit.site.path not in taken and _kind(edit) in kinds:
            found.setdefault(edit.site.path, edit)
    keys = _keys(pipeline, config, found.values()) or {}
    return [edit for path, edit in found.items() if path in keys and not shelf.has(keys[path])]


def _edits(pipeline: Pipeline, plan: GraftPlan | None, lenient: bool = False) -> tuple[Edit, ...]:
    """The operators that a plan puts in; none of one that edits the depth, which is distilled as a whole.

    lenient: none of a plan that can't be carried out; the row whose it is will say so.
    """
    if plan is None:
        return ()
    try:
        said = explain(pipeline.teacher, plan, pipeline.recipe.locality)
    except GraftError:
        if not lenient:
            raise
        return ()
    return () if said.groups or said.pruned else said.edits


def _alone(edit: Edit) -> Replace:
    return replace(edit.entry, layers=(edit.site.layer,))


def _kind(edit: Edit) -> str:
    """An entry of a plan without its layers."""
    return canonical_json({**_alone(edit).to_dict()["replace"], "layers": None})


def _distill(pipeline: Pipeline, config: DistillConfig, edits: list[Edit], shelf: Shelf) -> None:
    """Train these operators in one pass, and put them on the shelf."""
    run, keys = pipeline.run, _keys(pipeline, config, edits) or {}
    student = graft(pipeline.teacher, GraftPlan([_alone(edit) for edit in edits]), seed=pipeline.recipe.seed)
    with run.stoppable():
        outcome = distill(student, pipeline.teacher, pipeline.data, config, journal=run)
    lines = [line for line in run.metrics() if line.get("stage") == STAGE]
    for edit in edits:
        path = edit.site.path
        shelf.put(keys[path], student.get_submodule(path).state_dict(), {
            "path": path, "entry": edit.entry.to_dict(), "seconds": outcome.seconds / len(edits),
            "start_error": {kind: errors[path] for kind, errors in outcome.start_error.items() if path in errors},
            "final_error": outcome.final_error[path], "best_step": outcome.best_step[path],
            "rested": outcome.rested.get(path), "steps": outcome.rested.get(path, outcome.steps),
            "extraction_seconds": outcome.extraction_seconds / len(edits),
            "cache_bytes": outcome.cache_bytes / len(edits),
            "log": [line for line in (_only(line, path) for line in lines) if line],
        })  # fmt: skip
    if (code := run.stop_requested()) is not None:  # it came after the last step
        raise Interrupted(code, outcome.steps)


def _result(
    pipeline: Pipeline, config: DistillConfig, edits: Iterable[Edit], shelved: Mapping[str, Shelved]
) -> DistillResult:
    """What stage 1 would say had it trained these operators in one pass."""
    records = {path: item.record for path, item in shelved.items()}
    kinds = sorted({kind for record in records.values() for kind in record["start_error"]})
    steps = max((record["steps"] for record in records.values()), default=0)
    visits = steps * config.batch_size
    return DistillResult(
        start_error={
            kind: {p: r["start_error"][kind] for p, r in records.items() if kind in r["start_error"]} for kind in kinds
        },
        final_error={path: record["final_error"] for path, record in records.items()},
        best_step={path: record["best_step"] for path, record in records.items()},
        steps=steps,
        image_visits=visits,
        flops=_flops(pipeline.teacher, config, edits, shelved, visits),
        seconds=sum(record["seconds"] for record in records.values()),
        extraction_seconds=sum(record["extraction_seconds"] for record in records.values()),
        cache_bytes=round(sum(record["cache_bytes"] for record in records.values())),
        rested={path: record["rested"] for path, record in records.items() if record["rested"] is not None},
    )  # fmt: skip


def _flops(
    teacher: nn.Module, config: DistillConfig, edits: Iterable[Edit], shelved: Mapping[str, Any], visits: int
) -> float:
    """As stage 1 counts: a teacher pass for `reuse` visits (a stored sample, where cached), three of every operator."""
    cost = sum(edit.after.total for edit in edits if edit.site.path in shelved)
    stored = min(config.cache_samples, config.steps * config.batch_size)
    passes = stored if config.mode == "cached" else visits / config.reuse
    return family_of(teacher).flops_per_image(teacher) * passes + 3 * cost * visits


def _only(value: Any, path: str) -> dict[str, Any]:
    """A line of the log with what it says of one operator; empty if it says nothing."""
    kept: dict[str, Any] = {}
    about = False
    for key, item in value.items():
        if isinstance(item, Mapping):
            inner = {path: item[path]} if path in item else _inner(item, path)
            if inner:
                kept[key], about = inner, True
        else:
            kept[key] = item
    return kept if about or value.get("path") == path else {}


def _inner(value: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {
        key: {path: item[path]} for key, item in value.items() if isinstance(item, Mapping) and path in item
    }


def _merged_lines(logs: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines of several operators as one log: what was said at one step is one line again."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for log in logs:
        for line in log:
            place = (line.get("step", 0), _ORDER.get(line.get("event"), 0), line.get("path", ""))
            found[place] = _joined(found[place], line) if place in found else line
    return [found[place] for place in sorted(found)]


_ORDER = {"start": 0, None: 1, "validation": 2, "rest": 3}


def _joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(a)
    for key, value in b.items():
        below = result.get(key)
        result[key] = (
            _joined(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return result


__all__ = ["shared_stage_1"]

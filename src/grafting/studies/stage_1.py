"""Stage 1 of a row: distill the operators that no row has distilled yet, take over the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from grafting.families import family_of
from grafting.formats import weights
from grafting.pipeline import Pipeline
from grafting.plan import GraftPlan
from grafting.studies.shelf import Shelf, Shelved, operator_keys, plan_key
from grafting.surgery import Edit, explain, graft
from grafting.training.config import DistillConfig, seeded
from grafting.training.distillation import distill
from grafting.training.loop import Interrupted
from grafting.training.results import DistillResult

STAGE = "distill"
_TODO = "stage-1.json"  # in the row's folder: what it distills itself, so that a resumed row trains the same


def shared_stage_1(pipeline: Pipeline, shelf: Shelf) -> None:
    """Do stage 1 of a row, with every operator that is on the shelf taken from there, and put the rest on it.

    Leaves what `Pipeline.distill` would: the same weights, result and log (seconds are those of each operator's share
    of the pass that it was trained in). A recipe that leaves its losses to a measurement is distilled whole.
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
    keys = operator_keys(
        edits, pipeline.teacher, config, seed=recipe.seed, data_hash=pipeline.data.content_hash,
        device=pipeline.device, precision=_precision(pipeline, config),
    )  # fmt: skip
    if keys is None:
        pipeline.distill()
        return
    with run.writing(STAGE):
        _fill(pipeline, config, edits, keys, shelf)


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
    pipeline: Pipeline, config: DistillConfig, edits: tuple[Edit, ...], keys: Mapping[str, str], shelf: Shelf
) -> None:
    """Distill what is not on the shelf, put together the student, finish the stage."""
    run = pipeline.run
    run.bind("data", pipeline.data.name, pipeline.data.content_hash)
    todo = _todo(pipeline, keys, shelf)
    if todo:
        _distill(pipeline, config, [edit for edit in edits if edit.site.path in todo], keys, shelf)
    found = {path: shelf.get(key) for path, key in keys.items()}
    shelved = {path: item for path, item in found.items() if item is not None}
    student = pipeline.student()
    for path, item in shelved.items():
        student.get_submodule(path).load_state_dict(dict(item.state))
    run.save_student(student)
    if len(todo) < len(shelved):
        lines = _merged_lines(item.record["log"] for item in shelved.values())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        weights.write_bytes(run.path / "metrics.jsonl", text.encode())
    result = _result(pipeline, config, edits, shelved).to_dict()
    result |= pipeline.share_of_pretraining(result["flops"])
    run.finish(STAGE, result | {"taken_over": sorted(set(shelved) - set(todo))})


def _precision(pipeline: Pipeline, config: DistillConfig) -> str:
    from grafting.training.compute import make_compute

    return make_compute(pipeline.compute.device, config.precision).precision


def _todo(pipeline: Pipeline, keys: Mapping[str, str], shelf: Shelf) -> list[str]:
    """The sites that this row distills itself: decided once."""
    path = pipeline.run.path / _TODO
    known = set(weights.read_json(path, "stage 1").get("distills", [])) if path.is_file() else None
    begun = any((pipeline.run.path / "checkpoints" / STAGE).glob("*.pt"))
    todo = [
        site
        for site, key in keys.items()
        if (not shelf.has(key) if known is None or not begun else site in known)
    ]
    weights.write_json(path, {"distills": todo})
    return todo


def _distill(
    pipeline: Pipeline, config: DistillConfig, edits: list[Edit], keys: Mapping[str, str], shelf: Shelf
) -> None:
    run = pipeline.run
    plan = GraftPlan([replace(edit.entry, layers=(edit.site.layer,)) for edit in edits])
    student = graft(pipeline.teacher, plan, seed=pipeline.recipe.seed)
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

"""Stage 1 of a row: distill the operators that no row has distilled yet, take over the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from grafting.errors import CheckpointError, GraftError, Interrupted, RunError
from grafting.families import family_of
from grafting.formats import weights
from grafting.pipeline import Pipeline
from grafting.plan import GraftPlan, Replace
from grafting.studies.shelf import Shelf, Shelved, operator_keys, plan_key
from grafting.surgery import Edit, explain, graft
from grafting.training.circumstances import circumstances
from grafting.training.compute import make_compute
from grafting.training.config import DistillConfig, seeded
from grafting.training.distillation import distill
from grafting.training.results import DistillResult

STAGE = "distill"
_NOTES = "stage-1.json"  # in the row's folder: what it distills itself, so that a resumed row trains the same
Others = Callable[[], Sequence[GraftPlan]]


@dataclass(frozen=True)
class _Job:
    """Stage 1 of one row. known: what its results depend on besides settings and seed."""

    pipeline: Pipeline
    config: DistillConfig
    shelf: Shelf
    known: Mapping[str, Any]

    def keys(self, edits: Iterable[Edit]) -> dict[str, str] | None:
        """path -> key of what is trained; None where the recipe leaves its losses to a measurement."""
        return operator_keys(edits, self.config, self.pipeline.recipe.seed, self.known)


def shared_stage_1(pipeline: Pipeline, shelf: Shelf, others: Others = list) -> None:
    """Do stage 1 of a row, with every operator that is on the shelf taken from there, and put the rest on it.

    Leaves what `Pipeline.distill` would: the same weights, result and log (seconds are those of each operator's share
    of the pass that it was trained in). A recipe that leaves its losses to a measurement is distilled whole.
    others: gives the plans of rows that wait and are the same up to the end of stage 1. Where they put an operator of
    this row into more layers, these are distilled in the same pass of the teacher.
    """
    run, recipe = pipeline.run, pipeline.recipe
    if recipe.distill is None or run.result(STAGE) is not None:
        return
    if run.result("graft") is None:
        pipeline.graft()
    config = seeded(recipe.distill, recipe.seed)
    said = explain(pipeline.teacher, recipe.graft_plan, recipe.locality)
    precision = make_compute(pipeline.compute.device, config.precision).precision
    known = circumstances(pipeline.teacher, pipeline.data.content_hash, pipeline.device, precision)
    job = _Job(pipeline, config, shelf, known)
    if said.groups or said.pruned:
        _whole(job, said.plan)
        return
    keys = job.keys(said.edits)
    if keys is None:
        pipeline.distill()
        return
    with run.writing(STAGE):
        _fill(job, said.edits, keys, others)


def _whole(job: _Job, plan: GraftPlan) -> None:
    """A plan that edits the depth is distilled as a whole; another row with the same stage 1 takes over the student."""
    pipeline, shelf, run = job.pipeline, job.shelf, job.pipeline.run
    key = plan_key(plan, job.config, pipeline.recipe.seed, job.known)
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


def _fill(job: _Job, edits: tuple[Edit, ...], keys: Mapping[str, str], others: Others) -> None:
    """Distill what is not on the shelf, put together the student, finish the stage."""
    pipeline, run = job.pipeline, job.pipeline.run
    run.bind("data", pipeline.data.name, pipeline.data.content_hash)
    todo, more = _todo(job, edits, keys, others)
    own = [edit for edit in edits if edit.site.path in todo]
    if own and not (more and _did_together(job, own, more)):
        _distill(job, own)
    found = {path: job.shelf.get(key) for path, key in keys.items()}
    shelved = {path: item for path, item in found.items() if item is not None}
    student = pipeline.student()
    for path, item in shelved.items():
        student.get_submodule(path).load_state_dict(dict(item.state))
    run.save_student(student)
    if len(todo) < len(shelved) or more:
        lines = _merged_lines(item.record["log"] for item in shelved.values())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        weights.write_bytes(run.path / "metrics.jsonl", text.encode())
    result = _result(job, edits, shelved).to_dict()
    result |= pipeline.share_of_pretraining(result["flops"])
    run.finish(STAGE, result | {"taken_over": sorted(set(shelved) - set(todo))})


# ---- what is to be distilled


def _todo(
    job: _Job, edits: tuple[Edit, ...], keys: Mapping[str, str], others: Others
) -> tuple[list[str], list[Edit]]:
    """The sites that this row distills for itself, and what it distills for other rows: decided once."""
    run = job.pipeline.run
    if (run.path / _NOTES).is_file() and any((run.path / "checkpoints" / STAGE).glob("*.pt")):
        known = weights.read_json(run.path / _NOTES, "stage 1")
        besides = known.get("besides")
        return list(known.get("distills", [])), _edits(job, besides) if besides else []
    todo = [path for path, key in keys.items() if not job.shelf.has(key)]
    more = _of_others(job, edits, others()) if todo else []
    _note(job, todo, more, [keys[path] for path in todo])
    return todo, more


def _note(job: _Job, todo: list[str], more: list[Edit], tries: Iterable[str]) -> None:
    """tries: keys of what is trained here for this row, or was tried here for others: they don't try it for others."""
    tried = sorted({*tries, *(job.keys(more) or {}).values()})
    said = {"distills": todo, "besides": [alone(edit).to_dict() for edit in more], "tries": tried}
    weights.write_json(job.pipeline.run.path / _NOTES, said)


def _of_others(job: _Job, edits: tuple[Edit, ...], others: Sequence[GraftPlan]) -> list[Edit]:
    """Operators of this row's kinds in layers where other rows alone have them, that nobody distills yet."""
    kinds, own = {kind_of(edit.entry) for edit in edits}, {edit.site.path for edit in edits}
    found: dict[str, Edit] = {}
    for plan in others:
        entries = [e for e in plan.entries if isinstance(e, Replace) and kind_of(e) in kinds]
        if entries and all(isinstance(entry, Replace) for entry in plan.entries):
            try:
                more = _edits(job, entries)
            except GraftError:  # of a plan that can't be carried out: its row will say so
                continue
            for edit in more:
                if edit.site.path not in own:
                    found.setdefault(edit.site.path, edit)
    keys, tried = job.keys(found.values()) or {}, _tried_elsewhere(job)
    return [
        edit
        for path, edit in found.items()
        if path in keys and keys[path] not in tried and not job.shelf.has(keys[path])
    ]


def _tried_elsewhere(job: _Job) -> set[str]:
    """Keys of what another row trains, or has tried to."""
    own, tried = job.pipeline.run.path, set[str]()
    for path in own.parent.glob(f"*/{_NOTES}"):
        if path.parent != own:
            try:
                tried.update(weights.read_json(path, "stage 1").get("tries", []))
            except CheckpointError:  # it is just being removed
                continue
    return tried


def _edits(job: _Job, entries: Iterable[Any]) -> list[Edit]:
    """What entries of a plan, or their plan-file form, put in."""
    return list(explain(job.pipeline.teacher, GraftPlan(entries), job.pipeline.recipe.locality).edits)


def alone(edit: Edit) -> Replace:
    """The entry of one operator at one site."""
    return replace(edit.entry, layers=(edit.site.layer,))


def kind_of(entry: Replace) -> Replace:
    """An entry whatever its layers."""
    return replace(entry, layers=(0,))


# ---- distilling it


def _did_together(job: _Job, own: list[Edit], more: list[Edit]) -> bool:
    """Distill this row's operators and others' in one pass; False where that does not do: each row has its own then."""
    run = job.pipeline.run
    try:
        _distill(job, own, more)
        return True
    except (GraftError, torch.OutOfMemoryError, MemoryError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
    run.console.say(f"the operators of other rows are left to them: {said}")
    shutil.rmtree(run.path / "checkpoints" / STAGE, ignore_errors=True)
    keys = job.keys([*own, *more]) or {}
    _note(job, [edit.site.path for edit in own], [], keys.values())
    return False


def _distill(job: _Job, own: list[Edit], more: Sequence[Edit] = ()) -> None:
    """Train these operators in one pass, and put them on the shelf.

    more: for other rows. A step with bad gradients is one that all operators skip, so it must not be theirs: RunError.
    """
    pipeline, run, edits = job.pipeline, job.pipeline.run, [*own, *more]
    keys = job.keys(edits) or {}
    student = graft(pipeline.teacher, GraftPlan([alone(edit) for edit in edits]), seed=pipeline.recipe.seed)
    with run.stoppable():
        outcome = distill(student, pipeline.teacher, pipeline.data, job.config, journal=run)
    if more and outcome.skipped_steps:
        raise RunError(f"{outcome.skipped_steps} steps had gradients that are not finite")
    lines = [line for line in run.metrics() if line.get("stage") == STAGE]
    for edit in edits:
        path = edit.site.path
        if job.shelf.has(keys[path]):  # by an attempt that was killed at its end, or another process
            continue
        job.shelf.put(keys[path], student.get_submodule(path).state_dict(), {
            "path": path, "entry": edit.entry.to_dict(), "seconds": outcome.seconds / len(edits),
            "start_error": {kind: errors[path] for kind, errors in outcome.start_error.items() if path in errors},
            "final_error": outcome.final_error[path], "best_step": outcome.best_step[path],
            "rested": outcome.rested.get(path), "steps": outcome.rested.get(path, outcome.steps),
            "extraction_seconds": outcome.extraction_seconds / len(edits),
            "cache_bytes": outcome.cache_bytes / len(edits),
            "skipped_steps": outcome.skipped_steps, "loss": outcome.losses[path],
            "log": [line for line in (_only(line, path) for line in lines) if line],
        })  # fmt: skip
    if (code := run.stop_requested()) is not None:  # it came after the last step
        raise Interrupted(code, outcome.steps)


# ---- what is said of it


def _result(job: _Job, edits: Iterable[Edit], shelved: Mapping[str, Shelved]) -> DistillResult:
    """What stage 1 would say had it trained these operators in one pass."""
    records = {path: item.record for path, item in shelved.items()}
    kinds = sorted({kind for record in records.values() for kind in record["start_error"]})
    steps = max((record["steps"] for record in records.values()), default=0)
    visits = steps * job.config.batch_size
    return DistillResult(
        start_error={
            kind: {p: r["start_error"][kind] for p, r in records.items() if kind in r["start_error"]} for kind in kinds
        },
        final_error={path: record["final_error"] for path, record in records.items()},
        best_step={path: record["best_step"] for path, record in records.items()},
        steps=steps,
        image_visits=visits,
        flops=_flops(job.pipeline.teacher, job.config, edits, shelved, visits),
        seconds=sum(record["seconds"] for record in records.values()),
        extraction_seconds=sum(record["extraction_seconds"] for record in records.values()),
        cache_bytes=round(sum(record["cache_bytes"] for record in records.values())),
        rested={path: record["rested"] for path, record in records.items() if record["rested"] is not None},
        skipped_steps=max((record.get("skipped_steps", 0) for record in records.values()), default=0),
        losses={path: record["loss"] for path, record in records.items() if "loss" in record},
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

"""`graft study NAME --dry-run`: which rows would run, how long that would take here, and what is missing. Does nothing.

Times are put together from operators timed alone on the device, as those of `graft run --dry-run`. What rows share is
counted once: operators of stage 1, the teacher's predictions in stage 2, the teacher's samples.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grafting.analysis import estimate, pace
from grafting.analysis.latency import device_name
from grafting.cores import usable_cores
from grafting.errors import GraftError
from grafting.evaluation.reference import TEACHER
from grafting.families import family_of
from grafting.lora import is_lora
from grafting.needs import shortages, student_of
from grafting.pipeline import OTHER_NOISE, Pipeline
from grafting.plan import GraftPlan, Replace
from grafting.recipes.rows import Row, UnavailableError
from grafting.recipes.settings import Recipe
from grafting.rehearsal import check_inputs, in_time, teacher_of
from grafting.runs import RunFolder
from grafting.studies.identity import identity_of, taken_from
from grafting.studies.row_run import (
    Setting,
    asked,
    check_begun,
    check_row,
    going_on_from,
    lacks_locality,
    located,
    of_stage_1,
)
from grafting.studies.stage_1 import alone, kind_of
from grafting.surgery import explain, graft
from grafting.training.answers import MOST_BYTES
from grafting.training.compute import make_compute
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.loop import samples_per_pass

STAGES = ("distill", "finetune", "sample")


def rehearse_rows(setting: Setting, rows: Sequence[Row], jobs: int = 1) -> dict[str, Any]:
    """What running these rows would do, in JSON types; `rows` in the order in which they would run.

    {"rows": [{"name", "label", "state": "done" | "to do" | "left out" | "would fail", "why", "seconds": {stage:
    seconds}}], "missing": [...], "warnings": [...], "device", "jobs", "work_seconds": of all rows together,
    "elapsed_seconds": from start to end with `jobs` rows at a time}. Raises GraftError for what the study would refuse.
    """
    recipes = dict[str, Recipe]()
    for row in setting.study.rows:
        with contextlib.suppress(UnavailableError):
            check_row(setting, row)
            recipes[row.name] = located(setting, setting.recipe(row))
    threads, device = torch.get_num_threads(), torch.device(setting.device)
    torch.set_num_threads(max(1, threads // jobs))  # as a worker of several has
    try:
        study = _Rehearsal(setting)
        for row in setting.study.rows:
            if row.name in recipes and setting.result_file(row.name).is_file():
                with contextlib.suppress(GraftError):
                    study.seconds(row, recipes.pop(row.name))  # what it shares is there
        study.recipes += [recipes[row.name] for row in rows if row.name in recipes]
        found = [_rehearsed(study, row) for row in rows]
    finally:
        torch.set_num_threads(threads)
    each = [sum(said["seconds"].values()) for said in found if "seconds" in said]
    most = usable_cores() if device.type == "cpu" else max(1, torch.cuda.device_count())
    return {
        "rows": found, "missing": study.missing, "warnings": study.warnings, "jobs": jobs,
        "device": device_name(device),
        "work_seconds": sum(each), "elapsed_seconds": _span(each, min(jobs, most)),
    }  # fmt: skip


def _rehearsed(study: _Rehearsal, row: Row) -> dict[str, Any]:
    """What is said of one row."""
    setting, said = study.setting, {"name": row.name, "label": row.label, "state": "to do"}
    if setting.result_file(row.name).is_file():
        return {**said, "state": "done"}
    try:
        try:
            recipe = located(setting, setting.recipe(row))
        except UnavailableError as error:
            if not row.best_of:
                return {**said, "state": "left out", "why": str(error)}
            likely = setting.study.row(row.best_of[0])
            recipe = located(setting, setting.recipe(going_on_from(likely, row)))
            return {
                **said,
                "why": f"as if {likely.name} were the best",
                "seconds": study.seconds(row, recipe),
            }
        check_begun(setting, row, recipe)
        if lacks_locality(recipe):
            return {
                **said,
                "why": "its layers go by the locality that the study measures: not in the estimate",
            }
        if (taken := taken_from(setting.reuse, identity_of(row, recipe))) is not None:
            study.seconds(row, recipe)
            return {**said, "why": f"taken over from {taken[0].name}/{taken[1]}", "seconds": {}}
        return {**said, "seconds": study.seconds(row, recipe)}
    except Exception as error:  # of one row, as when it runs; others' operators may raise anything
        kind = "" if isinstance(error, GraftError) else f"{type(error).__name__}: "
        return {**said, "state": "would fail", "why": f"{kind}{error}"}


@dataclass
class _Rehearsal:
    """Seconds of rows, one after another: what an earlier one does for a later one is not counted again."""

    setting: Setting
    recipes: list[Recipe] = field(default_factory=list)  # of the rows that are to be done
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _watches: dict[tuple[Any, ...], pace.Stopwatch] = field(default_factory=dict)
    _teachers: dict[tuple[Any, ...], nn.Module] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)  # of what rows share
    _answered: dict[str, int] = field(default_factory=dict)  # question of stage 2 -> visits

    def seconds(self, row: Row, recipe: Recipe) -> dict[str, float]:
        """Of each stage of a row that is not finished."""
        teacher, found = self._teacher(row, recipe), dict[str, float]()
        if row.teacher is None:
            student = graft(teacher, explain(teacher, recipe.graft_plan, recipe.locality).plan)
            if recipe.distill is not None:
                found["distill"] = self._distill(recipe, recipe.distill, teacher)
            if recipe.finetune is not None:
                found["finetune"] = self._finetune(recipe, recipe.finetune, teacher, student)
            found["sample"] = self._samples(recipe, student) + self._teachers_samples(row, recipe, teacher)
        else:
            if row.teacher == "finetuned" and recipe.finetune is not None:
                alone = recipe.finetune.model_copy(update={"objectives": {"diffusion": 1.0}})
                found["finetune"] = self._finetune(recipe, alone, teacher, teacher)
            found["sample"] = self._teachers_samples(row, recipe, teacher)
        run = RunFolder(self.setting.row_folder(row.name))
        begun = (run.path / "run.json").is_file()
        return {stage: s for stage, s in found.items() if not (begun and run.result(stage))}

    def _teacher(self, row: Row, recipe: Recipe) -> nn.Module:
        """The teacher without values; what is missing or hardly fits is noted when it is first seen."""
        pipeline = Pipeline(recipe, RunFolder(self.setting.row_folder(row.name)), self.setting.device)
        absent: list[str] = []
        key = (recipe.model, recipe.num_heads, recipe.dtype)
        if key not in self._teachers:
            bare = estimate.meta_copy(teacher_of(pipeline, absent))
            self._teachers[key] = (
                nn.Module.to(bare, dtype=getattr(torch, recipe.dtype)) if recipe.dtype else bare
            )
        teacher = self._teachers[key]
        self.missing += [what for what in absent if what not in self.missing]
        if not self.recipes:  # of a row that is done
            return teacher
        needs = recipe.to_dict()
        if self._first(
            ["inputs", key, [needs[name] for name in ("data", "synthesize", "sample", "evaluate")]]
        ):
            check_inputs(pipeline, teacher, absent)
            self.missing += [what for what in absent if what not in self.missing]
        kinds = _kinds(recipe.graft_plan)
        if row.teacher is None and self._first(["memory", key, kinds, [needs[stage] for stage in STAGES]]):
            for line in shortages(recipe, teacher, torch.device(self.setting.device), 1):
                self.warnings.append(f"{row.name}: {line}")
        return teacher

    def _distill(self, recipe: Recipe, config: DistillConfig, teacher: nn.Module) -> float:
        """Of the operators that no earlier row has, and those of later rows that are trained in the same pass."""
        said = explain(teacher, recipe.graft_plan, recipe.locality)
        same = of_stage_1(recipe)
        if "auto" in {*config.losses.values(), *(edit.entry.loss for edit in said.edits)}:
            return self._stage_1(
                config, teacher, said.plan
            )  # measured for each row, which has its own operators then
        if said.groups or said.pruned:
            fresh = self._first([same, said.plan.to_dict()])
            return self._stage_1(config, teacher, said.plan) if fresh else 0.0
        edits = {edit.site.path: edit for edit in said.edits if self._first([same, alone(edit).to_dict()])}
        if not edits:
            return 0.0
        kinds = {kind_of(edit.entry) for edit in said.edits}
        for other in self.recipes:
            if of_stage_1(other) == same and not lacks_locality(other):
                theirs = None
                with contextlib.suppress(GraftError):  # its row says so
                    theirs = explain(teacher, other.graft_plan, other.locality)
                for edit in () if theirs is None or theirs.groups or theirs.pruned else theirs.edits:
                    if kind_of(edit.entry) in kinds and self._first([same, alone(edit).to_dict()]):
                        edits.setdefault(edit.site.path, edit)
        plan = GraftPlan([alone(edit) for edit in edits.values()])
        return self._stage_1(config, teacher, plan)

    def _stage_1(self, config: DistillConfig, teacher: nn.Module, plan: GraftPlan) -> float:
        watch = self._watch(config.precision, samples_per_pass(config, 1), teacher)
        return pace.distill_seconds(watch, teacher, graft(teacher, plan), config)

    def _finetune(
        self, recipe: Recipe, config: FinetuneConfig, teacher: nn.Module, student: nn.Module
    ) -> float:
        watch = self._watch(config.precision, samples_per_pass(config, 1), teacher)
        adapters = 0
        if config.lora is not None:
            adapted = student_of(recipe, "finetune", teacher, recipe.graft_plan)
            adapters = sum(p.numel() for name, p in adapted.named_parameters() if is_lora(name))
        found = pace.finetune_seconds(watch, teacher, student, config, 1, adapters)
        visits = config.steps * config.batch_size
        size = 4 * math.prod(family_of(teacher).sample_shape(teacher))
        if student is not teacher and (said := asked(recipe)) is not None and visits * size <= MOST_BYTES:
            question = json.dumps(said, sort_keys=True, default=str)
            known = self._answered.get(question, 0)
            self._answered[question] = max(known, visits)
            found -= min(known, visits) * watch.model(teacher).forward
        return found

    def _samples(self, recipe: Recipe, model: nn.Module) -> float:
        draw = recipe.sample
        size = min(draw.num, 64 if draw.batch_size == "auto" else draw.batch_size)
        watch = self._watch(draw.precision, size, model)
        return pace.sample_seconds(watch, model, num=draw.num, steps=draw.steps, guidance=draw.guidance)

    def _teachers_samples(self, row: Row, recipe: Recipe, teacher: nn.Module) -> float:
        """The finetuned teacher's are its own; others are drawn once for all rows of a seed."""
        config, drawn = (
            recipe.evaluate,
            [recipe.model, recipe.num_heads, recipe.dtype, recipe.sample.model_dump(mode="json")],
        )
        times = int(row.teacher == "finetuned" or self._first(["samples", recipe.seed, drawn]))
        if config is not None and config.reference == TEACHER:
            times += self._first(["samples", recipe.seed + OTHER_NOISE, drawn])
        return times * self._samples(recipe, teacher)

    def _watch(self, given: str, size: int, model: nn.Module) -> pace.Stopwatch:
        device = torch.device(self.setting.device)
        precision, dtype = make_compute(device, given).precision, next(model.parameters()).dtype
        key = (precision, dtype, size)
        return self._watches.setdefault(key, pace.Stopwatch(device, precision, dtype, size))

    def _first(self, what: Any) -> bool:
        """Whether something that rows share has not been counted yet; it has then."""
        key = json.dumps(what, sort_keys=True, default=str)
        fresh = key not in self._done
        self._done.add(key)
        return fresh


def _kinds(plan: GraftPlan) -> list[dict[str, Any]]:
    """A plan whatever its layers: rows of one operator take much the same memory."""
    return [(kind_of(entry) if isinstance(entry, Replace) else entry).to_dict() for entry in plan.entries]


def _span(seconds: Sequence[float], jobs: int) -> float:
    """From start to end, if each of `jobs` workers takes the next row when it is free."""
    ends = [0.0] * jobs
    for one in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + one)
    return max(ends)


def in_words(found: Mapping[str, Any]) -> Iterator[str]:
    """The rehearsal as lines for a person."""
    names = {"distill": "stage 1", "finetune": "stage 2", "sample": "sampling"}
    width = max((len(row["name"]) for row in found["rows"]), default=0)
    for row in found["rows"]:
        times = [f"{names[stage]} {in_time(s)}" for stage, s in row.get("seconds", {}).items() if s]
        said = [*([", ".join(times)] if times else []), *([row["why"]] if "why" in row else [])]
        yield f"{row['name']:<{width}}  {row['state']}{': ' if said else ''}{'; '.join(said)}"
    for what in found["missing"]:
        yield f"missing: {what}"
    for what in found["warnings"]:
        yield f"warning: {what}"
    todo = [row for row in found["rows"] if row["state"] == "to do"]
    unknown = sum("seconds" not in row for row in todo)
    jobs, work = found["jobs"], in_time(found["work_seconds"])
    yield (
        f"estimate for {found['device']}: {len(todo)} of {len(found['rows'])} rows to do, "
        f"{in_time(found['elapsed_seconds'])} from start to end"
        f"{f' with {jobs} rows at a time ({work} of work)' if jobs > 1 else ''}"
        f"{f', without {unknown} of them' if unknown else ''}"
    )
    yield "not in it: loading, checkpoints, decoding latents, measuring samples, what else the machine does meanwhile"


__all__ = ["in_words", "rehearse_rows"]

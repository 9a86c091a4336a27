"""`graft study NAME --dry-run`: which rows would run, how long that would take here, and what is missing. Does nothing.

Times are put together from operators timed alone on the device, as those of `graft run --dry-run`. What rows share is
counted once: operators of stage 1, the teacher's predictions in stage 2, the teacher's samples.
"""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from grafting.analysis import estimate, pace
from grafting.analysis.latency import device_name
from grafting.evaluation.reference import TEACHER
from grafting.lora import is_lora
from grafting.needs import shortages, student_of
from grafting.pipeline import OTHER_NOISE, Pipeline
from grafting.plan import GraftPlan, Replace
from grafting.recipes.rows import Row, UnavailableError
from grafting.recipes.settings import Recipe
from grafting.rehearsal import check_inputs, in_time, teacher_of
from grafting.runs import RunFolder
from grafting.studies.row_run import Setting, asked, check_row, lacks_locality, of_stage_1
from grafting.surgery import Edit, explain, graft
from grafting.training.compute import make_compute
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.loop import samples_per_pass

STAGES = ("distill", "finetune", "sample")


def rehearse_rows(setting: Setting, rows: Sequence[Row], jobs: int = 1) -> dict[str, Any]:
    """What running these rows would do, in JSON types; `rows` in the order in which they would run.

    {"rows": [{"name", "label", "state": "done" | "to do" | "left out", "why", "seconds": {stage: seconds}}],
    "missing": [...], "warnings": [...], "device", "jobs", "work_seconds": of all rows together, "elapsed_seconds":
    from start to end with `jobs` rows at a time}. Raises GraftError for what the study would refuse.
    """
    for row in setting.study.rows:
        with contextlib.suppress(UnavailableError):
            check_row(setting, row)
    found: list[dict[str, Any]] = []
    todo: list[tuple[dict[str, Any], Row, Recipe]] = []
    for row in rows:
        said: dict[str, Any] = {"name": row.name, "label": row.label, "state": "to do"}
        found.append(said)
        if setting.result_file(row.name).is_file():
            said["state"] = "done"
            continue
        try:
            todo.append((said, row, setting.recipe(row)))
        except UnavailableError as error:
            said |= {"state": "to do" if row.best_of else "left out", "why": str(error)}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))  # as a worker of several has
    try:
        study = _Rehearsal(setting, [(row, recipe) for _, row, recipe in todo])
        for said, row, recipe in todo:
            if lacks_locality(recipe):
                said |= {"why": "its layers go by the locality that the study measures: not in the estimate"}
            else:
                said["seconds"] = study.seconds(row, recipe)
    finally:
        torch.set_num_threads(threads)
    each = [sum(said["seconds"].values()) for said in found if "seconds" in said]
    return {
        "rows": found, "missing": study.missing, "warnings": study.warnings, "jobs": jobs,
        "device": device_name(torch.device(setting.device)),
        "work_seconds": sum(each), "elapsed_seconds": _span(each, jobs),
    }  # fmt: skip


@dataclass
class _Rehearsal:
    """Seconds of rows, one after another: what an earlier one does for a later one is not counted again."""

    setting: Setting
    rows: list[tuple[Row, Recipe]]
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _watches: dict[tuple[Any, ...], pace.Stopwatch] = field(default_factory=dict)
    _teachers: dict[tuple[Any, ...], nn.Module] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)  # of what rows share

    def seconds(self, row: Row, recipe: Recipe) -> dict[str, float]:
        """Of each stage of a row that is not finished."""
        teacher = self._teacher(row, recipe)
        known = RunFolder(self.setting.row_folder(row.name))
        left = [stage for stage in STAGES if not (_is_run(known) and known.result(stage))]
        if row.teacher is not None:
            found = {"sample": self._teachers_samples(row, recipe, teacher)}
            if row.teacher == "finetuned" and recipe.finetune is not None:
                alone = recipe.finetune.model_copy(update={"objectives": {"diffusion": 1.0}})
                found["finetune"] = self._finetune(recipe, alone, teacher, teacher)
            return {stage: found[stage] for stage in STAGES if stage in found}
        student = graft(teacher, explain(teacher, recipe.graft_plan, recipe.locality).plan)
        found = {}
        if "distill" in left and recipe.distill is not None:
            found["distill"] = self._distill(recipe, recipe.distill, teacher)
        if "finetune" in left and recipe.finetune is not None:
            found["finetune"] = self._finetune(recipe, recipe.finetune, teacher, student)
        if "sample" in left:
            found["sample"] = self._samples(recipe, student) + self._teachers_samples(row, recipe, teacher)
        return found

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
        if said.groups or said.pruned:
            fresh = self._first([same, said.plan.to_dict()])
            return self._stage_1(config, teacher, said.plan) if fresh else 0.0
        edits = {edit.site.path: edit for edit in said.edits if self._first([same, _alone(edit)])}
        if not edits:
            return 0.0
        kinds = {_kind(edit.entry) for edit in said.edits}
        for _, other in self.rows:
            if of_stage_1(other) == same and not lacks_locality(other):
                for edit in explain(teacher, other.graft_plan, other.locality).edits:
                    if _kind(edit.entry) in kinds and self._first([same, _alone(edit)]):
                        edits.setdefault(edit.site.path, edit)
        plan = GraftPlan([replace(edit.entry, layers=(edit.site.layer,)) for edit in edits.values()])
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
        question = asked(recipe)
        if student is not teacher and question is not None and not self._first(["answers", question]):
            found -= config.steps * config.batch_size * watch.model(teacher).forward
        return found

    def _samples(self, recipe: Recipe, model: nn.Module) -> float:
        draw = recipe.sample
        size = min(draw.num, 64 if draw.batch_size == "auto" else draw.batch_size)
        watch = self._watch(draw.precision, size, model)
        return pace.sample_seconds(watch, model, num=draw.num, steps=draw.steps, guidance=draw.guidance)

    def _teachers_samples(self, row: Row, recipe: Recipe, teacher: nn.Module) -> float:
        """The finetuned teacher's are its own; others are drawn once for all rows of a seed."""
        config, drawn = recipe.evaluate, recipe.sample.model_dump(mode="json")
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


def _is_run(folder: RunFolder) -> bool:
    return (folder.path / "run.json").is_file()


def _kind(entry: Replace) -> Replace:
    return replace(entry, layers=(0,))


def _alone(edit: Edit) -> dict[str, Any]:
    return replace(edit.entry, layers=(edit.site.layer,)).to_dict()


def _kinds(plan: GraftPlan) -> list[dict[str, Any]]:
    """A plan whatever its layers: rows of one operator take much the same memory."""
    return [(_kind(entry) if isinstance(entry, Replace) else entry).to_dict() for entry in plan.entries]


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
    todo = sum(row["state"] == "to do" for row in found["rows"])
    jobs, work = found["jobs"], in_time(found["work_seconds"])
    yield (
        f"estimate for {found['device']}: {todo} of {len(found['rows'])} rows to do, "
        f"{in_time(found['elapsed_seconds'])} from start to end"
        f"{f' with {jobs} rows at a time ({work} of work)' if jobs > 1 else ''}"
    )
    yield "not in it: loading, checkpoints, decoding latents, measuring samples, what else the machine does meanwhile"


__all__ = ["in_words", "rehearse_rows"]

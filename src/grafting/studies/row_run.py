"""One row of a study: a run folder of its own, what it may take over from others, and its result."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grafting.analysis.costs import plan_cost
from grafting.console import Console
from grafting.errors import DivergedError, GraftError, RunError
from grafting.evaluation import evaluate
from grafting.evaluation.reference import TEACHER
from grafting.families import family_of
from grafting.formats import weights
from grafting.generation import generate
from grafting.pipeline import OTHER_NOISE, Pipeline
from grafting.plan import GraftPlan
from grafting.processes import own_device
from grafting.recipes import parse_overrides, recipe_mapping
from grafting.recipes.rows import Row, Study, UnavailableError, row_recipe
from grafting.recipes.settings import Recipe
from grafting.runs import RunFolder
from grafting.selectors import needs_locality
from grafting.studies.control import finetune_teacher
from grafting.studies.identity import (
    bound,
    check_identity,
    identity_of,
    record_identity,
    taken_from,
)
from grafting.studies.share import alone_in, is_at_work, link
from grafting.studies.shelf import Shelf
from grafting.studies.stage_1 import shared_stage_1
from grafting.training.answers import question
from grafting.training.config import seeded

TRAINING = ("distill", "finetune")
_NOT_OF_THE_RESULT = ("name", "about", "preset", "trackers")
_NOT_OF_STAGE_1 = (
    *_NOT_OF_THE_RESULT,
    "plan",
    "init",
    "finetune",
    "sample",
    "evaluate",
    "pretraining",
    "locality",
)


@dataclass(frozen=True)
class Setting:
    """What all rows of a running study share.

    reuse: folders of studies whose rows and operators may be taken over. wanted: the rows that are to be done.
    """

    study: Study
    folder: Path
    overrides: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    reuse: tuple[Path, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    wanted: tuple[Row, ...] = ()

    @classmethod
    def of(
        cls, study: Study, folder: Path, *, model: str | None, seed: int, device: str, changes: Sequence[str] | None,
        reuse: Sequence[Path] = (), wanted: Sequence[Row] = (),
    ) -> Setting:  # fmt: skip
        """From what the command line gives."""
        overrides = (*(changes or ()), *((f"model={model}",) if model else ()))
        given = parse_overrides(overrides)
        return cls(study, folder, overrides, seed, device, tuple(reuse), given, tuple(wanted))

    def on(self, number: int) -> Setting:
        """The same for worker `number` of this machine, which has a GPU of its own."""
        return replace(self, device=own_device(self.device, number))

    @property
    def shelf(self) -> Shelf:
        """The distilled operators of this study, and of those whose work may be taken over."""
        others = tuple(folder / "shared" / "operators" for folder in self.reuse)
        return Shelf(self.folder / "shared" / "operators", others)

    @property
    def answers(self) -> Path:
        """What the teacher predicts in stage 2, for rows that ask the same; not kept beyond the last row."""
        return self.folder / "shared" / "answers"

    def recipe(self, row: Row) -> Recipe:
        """The recipe of a row. Raises UnavailableError, RunError."""
        if row.best_of:
            row = self._best(row)
        base = recipe_mapping(self.study.recipe) if self.study.recipe else self.study.base
        return row_recipe(self.study, row, self.given, base, self.seed)

    def _best(self, row: Row) -> Row:
        """A row that goes on from the best of others: their changes, its own name, label and seed."""
        found = []
        for name in row.best_of:
            path = self.result_file(name)
            if not path.is_file():
                raise UnavailableError(
                    f"row {row.name!r} goes on from the best of {', '.join(row.best_of)}; {name} is not done"
                )
            distance = distance_of(weights.read_json(path, "result"))
            if distance is not None:
                found.append((distance, name))
        if not found:
            raise UnavailableError(f"row {row.name!r}: none of {', '.join(row.best_of)} has a result")
        return going_on_from(self.study.row(min(found)[1]), row)

    def row_folder(self, name: str) -> Path:
        return self.folder / "rows" / name

    def result_file(self, name: str) -> Path:
        return self.row_folder(name) / "result.json"


def going_on_from(best: Row, row: Row) -> Row:
    """A row of `best_of` once it is known which is the best."""
    return Row(row.name, row.label, {**best.changes, **row.changes}, paper=row.paper, share=best.share,
               times=best.times, seed=row.seed, rank=row.rank)  # fmt: skip


def distance_of(result: Mapping[str, Any]) -> float | None:
    """The Frechet distance of a result: `fid` in inception's features, `fd` in any other."""
    metrics = result.get("metrics", {})
    value = metrics.get("fid", metrics.get("fd"))
    return None if value is None else float(value)


@dataclass
class _RowPipeline(Pipeline):
    """The stages of a row. It takes the teacher's samples from the study, once it comes to sampling itself."""

    setting: Setting | None = None

    def sample(self) -> dict[str, Any]:
        """Not before: whoever draws the teacher's takes hours for 50,000, in which other rows can train."""
        assert self.setting is not None
        folder, config = self.run.path / "samples", self.recipe.evaluate
        link(teacher_samples(self.setting, self), folder / "teacher.npz")
        if config is not None and config.reference == TEACHER:
            link(teacher_samples(self.setting, self, OTHER_NOISE), folder / "reference.npz")
        return super().sample()


def run_row(setting: Setting, row: Row, console: Console) -> dict[str, Any]:
    """Do what is not done yet of a row; returns its result, in JSON types.

    Raises UnavailableError (it needs what was not given), GraftError (it failed), Interrupted.
    """
    recipe = setting.recipe(row)
    if lacks_locality(recipe):
        recipe = recipe.model_copy(update={"locality": _locality(setting, recipe, console)})
    path = setting.row_folder(row.name)
    identity = identity_of(row, recipe)
    check_identity(path, identity, row.name)
    if (taken := _take_over(setting, path, identity)) is not None:
        record_identity(path, identity, row.name)
        return taken
    answers = setting.answers if _shares_answers(setting, row, recipe) else None
    pipeline = _RowPipeline(
        recipe, RunFolder(path, console), setting.device, answers=answers, setting=setting
    )
    pipeline.check(to_the_end=True)  # before anything is kept that would bind the row to these settings
    record_identity(path, identity, row.name)
    if row.teacher is not None:
        return _run_teacher(setting, row, pipeline, path, console)
    return _run_student(setting, row, pipeline, path, console)


def check_row(setting: Setting, row: Row) -> None:
    """What can be said of a row before any work: settings that no row can have, or other ones than a finished row has.

    Raises UnavailableError, RunError.
    """
    recipe = setting.recipe(row)
    if recipe.evaluate is None:
        raise RunError(f"study {setting.study.name!r} compares samples; leave evaluate as it is")
    if not setting.result_file(row.name).is_file():
        return
    check_begun(setting, row, located(setting, recipe))


def check_begun(setting: Setting, row: Row, recipe: Recipe) -> None:
    """Refuse to go on with a row that was begun with other settings. Raises RunError."""
    check_identity(setting.row_folder(row.name), identity_of(row, recipe), row.name)


def located(setting: Setting, recipe: Recipe) -> Recipe:
    """The recipe with the locality that the study has measured, if it needs that and it is there."""
    file = _locality_file(setting)
    return (
        recipe.model_copy(update={"locality": str(file)})
        if lacks_locality(recipe) and file.is_file()
        else recipe
    )


def _run_student(
    setting: Setting, row: Row, pipeline: Pipeline, path: Path, console: Console
) -> dict[str, Any]:
    recipe = pipeline.recipe
    pipeline.run = RunFolder.create(path, recipe.to_dict(), console, resume=True)
    diverged = None
    try:
        with pipeline.run.writing():
            shared_stage_1(pipeline, setting.shelf, lambda: _same_stage_1(setting, row, recipe))
            pipeline.all()
    except DivergedError as error:
        diverged = str(error)
    stages = pipeline.run.read()["stages"]
    trained = [stages[stage] for stage in TRAINING if stage in stages]
    result: dict[str, Any] = {
        "flops": sum(stage.get("flops", 0) for stage in trained),
        "share_of_pretraining": sum(stage.get("share_of_pretraining", 0) for stage in trained),
        "seconds": sum(stage.get("seconds", 0) for stage in trained),
        "cost": plan_cost(pipeline.teacher, recipe.graft_plan, recipe.locality),
        "start_error": stages.get("distill", {}).get("start_error"),
        "final_error": stages.get("distill", {}).get("final_error"),
        "seed": recipe.seed,
    }
    if diverged is not None:
        return {"metrics": {}, "protocol": {}, "samples": None, "diverged": diverged, **result}
    found = json.loads((path / "evaluation.json").read_text())["student"]
    return {
        "metrics": found["metrics"],
        "protocol": found["protocol"],
        "samples": "samples/student.npz",
        **result,
    }


def _others(setting: Setting, row: Row) -> Iterator[tuple[Row, Recipe]]:
    """The other rows that are wanted and can be run, with their recipes."""
    for other in setting.wanted:
        if other.name != row.name and other.teacher is None:
            with contextlib.suppress(GraftError):  # it can't be run, or not yet; the row itself will say so
                yield other, setting.recipe(other)


def _same_stage_1(setting: Setting, row: Row, recipe: Recipe) -> list[GraftPlan]:
    """Plans of the rows that wait to be done and are like this one, plans apart, up to the end of stage 1."""
    own = of_stage_1(recipe)
    return [
        theirs.graft_plan
        for other, theirs in _others(setting, row)
        if not setting.result_file(other.name).is_file()
        and not is_at_work(setting.row_folder(other.name))
        and (recipe.locality is not None or not lacks_locality(theirs))
        and of_stage_1(theirs) == own
    ]


def _shares_answers(setting: Setting, row: Row, recipe: Recipe) -> bool:
    """Whether another row puts the same questions to the teacher in stage 2."""
    own = asked(recipe)
    return own is not None and any(asked(theirs) == own for _, theirs in _others(setting, row))


def asked(recipe: Recipe) -> tuple[Any, ...] | None:
    """What a row asks the teacher in stage 2; rows with the same here share the answers. None: it shares none."""
    said = question(seeded(recipe.finetune, recipe.seed)) if recipe.finetune is not None else None
    return None if said is None else (said, _without(recipe, *_NOT_OF_STAGE_1, "distill"))


def of_stage_1(recipe: Recipe) -> dict[str, Any]:
    """What rows that share distilled operators have in common: all up to the end of stage 1, but for the plan."""
    return _without(recipe, *_NOT_OF_STAGE_1)


def _without(recipe: Recipe, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_dict().items() if key not in keys}


def _run_teacher(
    setting: Setting, row: Row, pipeline: Pipeline, path: Path, console: Console
) -> dict[str, Any]:
    """The teacher's own rows: as it is, under another noise seed, or finetuned like the student."""
    recipe, file = pipeline.recipe, path / "samples" / "student.npz"
    assert recipe.evaluate is not None  # `check_row` has refused it
    params = sum(parameter.numel() for parameter in pipeline.teacher.parameters())
    flops = family_of(pipeline.teacher).flops_per_image(pipeline.teacher)
    result: dict[str, Any] = {
        "flops": 0.0, "seconds": 0.0, "share_of_pretraining": 0.0, "seed": recipe.seed,
        "cost": {"rows": [], "model": {"params": [params, params], "flops_per_image": [flops, flops]}},
    }  # fmt: skip
    if row.teacher == "finetuned":
        run = RunFolder.create(path, recipe.to_dict(), console, resume=True)
        with run.writing("finetune"):
            if (outcome := run.result("finetune")) is None:
                model, outcome = finetune_teacher(pipeline, run)
                _sample(model, recipe, file, console)
                run.finish("finetune", outcome)  # only now: its weights are in the checkpoints alone
        result |= outcome
    else:
        link(teacher_samples(setting, pipeline), file)
    reference = recipe.evaluate.reference
    if reference == TEACHER:
        reference = str(teacher_samples(setting, pipeline, OTHER_NOISE))
    found = evaluate(file, reference, recipe.evaluate.features, device=setting.device)
    return {
        "metrics": found["metrics"],
        "protocol": found["protocol"],
        "samples": "samples/student.npz",
        **result,
    }


def teacher_samples(setting: Setting, pipeline: Pipeline, other: int = 0) -> Path:
    """Samples of the unedited teacher from the noise of this recipe's seed plus `other`, drawn once for all rows."""
    seed, given = pipeline.recipe.seed + other, bound(pipeline.recipe.to_dict())
    given["sample"].pop("truncate")  # of prompts, which no study has
    how = json.dumps([given[key] for key in ("model", "num_heads", "dtype", "sample")])
    name = f"seed-{seed}-{hashlib.sha256(how.encode()).hexdigest()[:8]}"
    place = Path("shared", "teacher", name, "samples.npz")
    file = setting.folder / place
    with alone_in(file.parent, pipeline.run.console.say):
        drawn = next((folder / place for folder in setting.reuse if (folder / place).is_file()), None)
        if drawn is not None:
            link(drawn, file)
        elif not file.is_file():
            recipe = pipeline.recipe.model_copy(update={"seed": seed})
            _sample(pipeline.teacher, recipe, file, pipeline.run.console)
    return file


def _sample(model: Any, recipe: Recipe, file: Path, console: Console) -> None:
    generate(
        model, file, seed=recipe.seed, **recipe.sample.model_dump(exclude={"prompts", "truncate"}),
        describe={"model": "teacher"},
        progress=lambda done, total: console.progress("sample teacher", done, total, "images"),
    )  # fmt: skip


def lacks_locality(recipe: Recipe) -> bool:
    """Whether a recipe chooses layers by a locality that it has not been given."""
    entries = [entry["replace"] for entry in recipe.plan if "replace" in entry]
    return recipe.locality is None and any(needs_locality(entry["layers"]) for entry in entries)


def _locality_file(setting: Setting) -> Path:
    return setting.folder / "shared" / "locality" / "locality.json"


def _locality(setting: Setting, recipe: Recipe, console: Console) -> str:
    """The locality of every layer, measured once for the study."""
    file = _locality_file(setting)
    with alone_in(file.parent):
        if not file.is_file():
            from grafting.analysis.locality import measure_locality

            console.say("measuring the locality of every layer")
            teacher = Pipeline(recipe, RunFolder(file.parent, console), setting.device).teacher
            found = measure_locality(
                teacher, seed=recipe.seed,
                progress=lambda done, total: console.progress("locality", done, total, "passes"),
            )  # fmt: skip
            weights.write_json(file, found)
    return str(file)


def _take_over(setting: Setting, path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of the same row in a folder whose work may be taken over, with its samples."""
    if (found := taken_from(setting.reuse, identity)) is None:
        return None
    folder, name = found
    row = folder / "rows" / name
    result = weights.read_json(row / "result.json", "result")
    if result.get("samples"):
        link(row / result["samples"], path / "samples" / "student.npz")
        result["samples"] = "samples/student.npz"
    return {**result, "taken_from": f"{folder.name}/{name}"}


__all__ = [
    "Setting",
    "asked",
    "check_begun",
    "check_row",
    "distance_of",
    "going_on_from",
    "lacks_locality",
    "located",
    "of_stage_1",
    "run_row",
]

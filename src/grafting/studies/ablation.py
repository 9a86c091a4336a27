"""Studies of rows: a set of runs that differ in a few settings, each resumable, ending in one table and one page.

A row is a run folder under `rows/`. Finished rows are never run again; stage 1 is taken over from an earlier row whose
stage 1 is the same; a row that fails is reported and the others go on.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafting.console import Console
from grafting.errors import GraftError, RunError
from grafting.evaluation import evaluate
from grafting.formats import weights
from grafting.generation import generate
from grafting.pipeline import Pipeline
from grafting.recipes import Recipe, load_recipe
from grafting.report.study import write_study
from grafting.runs import RunFolder, environment
from grafting.studies.control import finetune_teacher


@dataclass(frozen=True)
class Row:
    """One row: what it changes in the study's recipe. `teacher`: the row is the teacher (finetuned, if so said)."""

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None  # "as it is", "other noise" or "finetuned"


@dataclass(frozen=True)
class Study:
    """A recipe and the rows that vary it."""

    name: str
    title: str
    about: str
    recipe: str
    rows: tuple[Row, ...]


_RANDOM_HALF = [
    {"replace": {"target": "mha", "layers": "interleaved-50", "with": "hyena_x", "init": "random"}}
]
_SELF_GRAFT = [{"replace": {"target": "mha", "layers": "all", "with": "mha", "init": "random"}}]
_DIFFUSION = {"objectives": {"diffusion": 1.0}}

STUDIES = {
    "demo-ablation": Study(
        name="demo-ablation",
        title="What each part of the method does, on dit-fashion",
        about=(
            "Half of the attention of dit-fashion becomes hyena_x. Same data, noise and budgets in every row. "
            "Controls: the teacher under other noise, and the teacher finetuned with the same stage-2 budget."
        ),
        recipe="demo",
        rows=(
            Row("teacher", "teacher", teacher="as it is"),
            Row("teacher-noise", "teacher, other noise seed", teacher="other noise"),
            Row("teacher-finetuned", "teacher, finetuned with the stage-2 budget", teacher="finetuned"),
            Row("random", "random init, no training", {"plan": _RANDOM_HALF, "distill": None, "finetune": None}),
            Row("stage-1", "stage 1 only", {"finetune": None}),
            Row("stage-2", "stage 2 only (donor init)", {"distill": None}),
            Row("both", "both stages (the demo)"),
            Row("both-diffusion", "both stages, diffusion loss only", {"finetune": _DIFFUSION}),
            Row("both-random", "both stages, random init", {"plan": _RANDOM_HALF}),
            Row("paper-like", "random init, diffusion loss only", {"plan": _RANDOM_HALF, "finetune": _DIFFUSION}),
            Row("self-graft", "all attention re-learned from random init", {"plan": _SELF_GRAFT}),
            Row("budget-x3", "both stages, three times the steps", {"distill": {"steps": 3}, "finetune": {"steps": 3}}),
        ),
    ),
}  # fmt: skip
_TIMES_BUDGET = ("budget-x3",)


def run_rows(
    study: Study, folder: Path, console: Console, *, model: str | None = None, seed: int = 0,
    only: list[str] | None = None, device: str = "cpu", changes: list[str] | None = None,
) -> Path:  # fmt: skip
    """Run the rows that are not done yet and write study.json, study.html. Raises RunError."""
    unknown = sorted(set(only or []) - {row.name for row in study.rows})
    if unknown:
        raise RunError(
            f"study {study.name!r} has no row {unknown[0]!r}: it has {', '.join(row.name for row in study.rows)}"
        )
    base = load_recipe(
        study.recipe, [*(changes or []), f"seed={seed}", *([f"model={model}"] if model else [])]
    )
    for row in study.rows:
        result = folder / "rows" / row.name / "result.json"
        if result.is_file() or (only and row.name not in only):
            continue
        console.say(f"== {row.label}")
        try:
            found = _run_row(base, row, folder, console, device)
        except GraftError as error:
            console.say(f"row {row.name} failed: {error}")
            weights.write_json(folder / "failures" / f"{row.name}.json", {"error": str(error)})
            continue
        weights.write_json(result, found)
    return write_study(folder, _collect(study, base, folder))


def _run_row(base: Recipe, row: Row, folder: Path, console: Console, device: str) -> dict[str, Any]:
    path = folder / "rows" / row.name
    if row.teacher is not None:
        return _run_teacher(base, row, path, console, device)
    recipe = _changed(base, row)
    pipeline = Pipeline(recipe, RunFolder(path, console), device, keep_stage_1=True)
    pipeline.check()
    pipeline.run = RunFolder.create(path, recipe.to_dict(), console, resume=True)
    _take_over_stage_1(recipe, pipeline.run, folder)
    _take_over_teacher_samples(folder, path)
    pipeline.all()
    evaluation = json.loads((path / "evaluation.json").read_text())["student"]
    stages = pipeline.run.read()["stages"]
    flops = sum(stages.get(stage, {}).get("flops", 0) for stage in ("distill", "finetune"))
    return {
        "metrics": evaluation["metrics"],
        "protocol": evaluation["protocol"],
        "flops": flops,
        "share_of_pretraining": sum(
            stages.get(s, {}).get("share_of_pretraining", 0) for s in ("distill", "finetune")
        ),
        "seconds": sum(stages.get(stage, {}).get("seconds", 0) for stage in ("distill", "finetune")),
        "samples": "samples/student.npz",
    }


def _run_teacher(base: Recipe, row: Row, path: Path, console: Console, device: str) -> dict[str, Any]:
    """The teacher's own rows: as it is, under another noise seed, or finetuned like the student."""
    pipeline = Pipeline(base, RunFolder(path, console), device)
    model, result = pipeline.teacher, {"flops": 0.0, "seconds": 0.0, "share_of_pretraining": 0.0}
    if row.teacher == "finetuned":
        run = RunFolder.create(path, base.to_dict(), console, resume=True)
        model, outcome = finetune_teacher(pipeline, run)
        result |= outcome
    seed = base.seed + (1000 if row.teacher == "other noise" else 0)
    file = path / "samples" / "student.npz"
    generate(
        model, file, seed=seed, **base.sample.model_dump(), describe={"model": "teacher"},
        progress=lambda done, total: console.progress("sample", done, total, "images"),
    )  # fmt: skip
    assert base.evaluate is not None  # the recipes of studies have it
    found = evaluate(file, base.evaluate.reference, base.evaluate.features, device=device)
    return {
        "metrics": found["metrics"],
        "protocol": found["protocol"],
        "samples": "samples/student.npz",
        **result,
    }


def _changed(base: Recipe, row: Row) -> Recipe:
    data = copy.deepcopy(base.to_dict())
    for key, value in row.changes.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            change = dict(value)
            if row.name in _TIMES_BUDGET:
                change = {name: factor * data[key][name] for name, factor in change.items()}
            data[key] |= change
        else:
            data[key] = value
    data["name"] = row.name
    return Recipe.model_validate(data)


def _stage_1_key(recipe: Mapping[str, Any]) -> str:
    """Two recipes with the same key have the same stage 1, to the bit."""
    keys = ("model", "num_heads", "data", "fraction", "plan", "locality", "seed", "distill")
    return json.dumps({key: recipe.get(key) for key in keys}, sort_keys=True)


def _take_over_stage_1(recipe: Recipe, run: RunFolder, folder: Path) -> None:
    """Copy the grafted and distilled student of a finished row whose stage 1 is this one's."""
    if recipe.distill is None or run.result("graft") is not None:
        return
    for other in sorted((folder / "rows").iterdir()):
        if other == run.path or not (other / "stage-1").is_dir():
            continue
        theirs = RunFolder.open(other)
        if _stage_1_key(theirs.recipe()) == _stage_1_key(recipe.to_dict()):
            shutil.copytree(other / "stage-1", run.path / "graft", dirs_exist_ok=True)
            shutil.copy(other / "plan.yaml", run.path / "plan.yaml")
            lines = [r for r in theirs.metrics() if r.get("stage") == "distill"]
            weights.write_bytes(
                run.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in lines).encode()
            )
            for stage in ("graft", "distill"):
                run.finish(stage, {**(theirs.result(stage) or {}), "taken_from": other.name})
            return


def _take_over_teacher_samples(folder: Path, path: Path) -> None:
    """Every row has the same teacher, noise and protocol: its samples are drawn once."""
    source = folder / "rows" / "teacher" / "samples" / "student.npz"
    target = path / "samples" / "teacher.npz"
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _collect(study: Study, base: Recipe, folder: Path) -> dict[str, Any]:
    rows = []
    for row in study.rows:
        path = folder / "rows" / row.name
        entry: dict[str, Any] = {"name": row.name, "label": row.label, "samples": None}
        if (path / "result.json").is_file():
            found = json.loads((path / "result.json").read_text())
            entry |= {
                **found["metrics"],
                **{k: found[k] for k in ("flops", "seconds", "share_of_pretraining")},
            }
            entry["samples"] = str(Path("rows") / row.name / found["samples"])
        elif (failure := folder / "failures" / f"{row.name}.json").is_file():
            entry["error"] = json.loads(failure.read_text())["error"]
        else:
            entry["error"] = "not run"
        rows.append(entry)
    columns = [("fd", "Frechet distance"), ("label_accuracy", "label accuracy"), ("precision", "precision"),
               ("recall", "recall"), ("is", "inception-style score"), ("seconds", "training, s"),
               ("share_of_pretraining", "share of pretraining FLOPs")]  # fmt: skip
    data = {
        "name": study.name,
        "title": study.title,
        "about": study.about,
        "columns": [{"key": key, "label": label} for key, label in columns],
        "rows": rows,
        "findings": _findings(rows),
        "recipe": base.to_dict(),
        "protocol": base.sample.model_dump(mode="json") | {"data": base.data, "seed": base.seed},
        "command": f"graft study {study.name} --seed {base.seed}",
        "environment": environment(),
        "scatter": {"x": "share_of_pretraining", "y": "fd"},
    }
    weights.write_json(folder / "study.json", data)
    return data


def _findings(rows: list[dict[str, Any]]) -> list[str]:
    """What the numbers say at once: every row's Frechet distance over the teacher's, and how far noise alone goes."""
    by_name = {row["name"]: row for row in rows}
    teacher, other = by_name.get("teacher", {}).get("fd"), by_name.get("teacher-noise", {}).get("fd")
    if not teacher or not other:
        return []
    found = [f"Another noise seed moves the teacher's Frechet distance from {teacher:.2f} to {other:.2f}."]
    ranked = sorted(
        (r for r in rows if r.get("fd") and not r["name"].startswith("teacher")), key=lambda r: r["fd"]
    )
    found += [f"{row['label']}: {row['fd'] / teacher:.2f} times the teacher's distance." for row in ranked]
    return found

"""A recipe that runs in seconds: a model of four blocks of width 32, eighty small images, a few steps of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny_dit

from grafting import save_model
from grafting.console import Console
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe
from grafting.runs import RunFolder

STAGE = {"steps": 4, "batch_size": 4, "num_validation": 4, "log_every": 1, "validate_every": 2, "checkpoint_every": 2,
         "precision": "fp32"}  # fmt: skip


def tiny_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Its model and data are written into `folder`; `changes` are merged into the recipe, one level deep."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_model(tiny_dit(), folder / "model")
        x = np.random.default_rng(0).normal(size=(80, 1, 8, 8)).clip(-1, 1)
        np.savez(folder / "data.npz", arr_0=x.astype(np.float32), arr_1=np.arange(80) % 4)
    recipe: dict[str, Any] = {
        "model": str(folder / "model"), "data": str(folder / "data.npz"), "evaluate": None,
        "plan": [{"replace": {"target": "mha", "layers": [1], "with": "hyena_x"}}],
        "distill": {**STAGE, "fit_samples": 8}, "finetune": dict(STAGE), "sample": {"num": 8, "steps": 2},
    }  # fmt: skip
    for key, value in changes.items():
        recipe[key] = recipe[key] | value if isinstance(value, dict) and recipe.get(key) else value
    return recipe


def run_as_one_of_several(recipe: dict[str, Any], folder: Path) -> None:
    """All stages of a recipe in a run folder that the first process makes and the others read."""
    resolved = load_recipe(recipe)
    pipeline = Pipeline(resolved, RunFolder(folder, writer=False))
    main = pipeline.compute.is_main
    if main:
        pipeline.run = RunFolder.create(folder, resolved.to_dict(), Console(quiet=True))
    pipeline.compute.wait()
    if not main:
        pipeline.run = RunFolder(folder, writer=False)
    pipeline.all()


def tiny_pipeline(folder: Path, name: str = "run", *, resume: bool = False, **changes: Any) -> Pipeline:
    """The pipeline of that recipe in the run folder `folder`/`name`."""
    recipe = load_recipe(tiny_recipe(folder, **changes))
    run = RunFolder.create(folder / name, recipe.to_dict(), Console(quiet=True), resume=resume)
    return Pipeline(recipe, run)

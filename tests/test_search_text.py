"""A search on a text-to-image model: captions, latents that are not square, weights in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pixart_tools import save_tiny_pipeline
from tiny_runs import STAGE

from grafting import GraftPlan, Replace, load_graft
from grafting.families import family_of
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe
from grafting.runs import RunFolder
from grafting.search import search_plan
from grafting.search.damage import Damage
from grafting.training.config import FinetuneConfig

pytestmark = pytest.mark.usefixtures("quiet_transformers")


def test_a_text_to_image_model_in_bfloat16_is_searched_on_its_pairs(
    tmp_path: Path, graft_command: Callable[..., str]
) -> None:
    base, pairs, out = (tmp_path / name for name in ("base", "pairs", "search"))
    save_tiny_pipeline(base)
    (tmp_path / "prompts.txt").write_text("the red cat\nsun\na dog near the sea")
    graft_command(
        "synthesize", base, "--prompts", tmp_path / "prompts.txt", "--num", 12, "--out", pairs, "--steps", 2,
        "--height", 16, "--width", 24, "--batch-size", 4,
    )  # fmt: skip
    stage = {**STAGE, "num_validation": 0}
    recipe = load_recipe({
        "model": str(base), "data": str(pairs), "dtype": "bfloat16", "distill": {**stage, "fit_samples": 8},
        "finetune": stage, "evaluate": None, "plan": [{"replace": {"target": "mha", "layers": [0], "with": "hyena_x"}}],
    })  # fmt: skip
    candidates = GraftPlan([
        Replace("mha", "all", "hyena_x"), Replace("mlp", [1, 2], "mlp", {"ratio": 3})
    ])  # fmt: skip
    found = search_plan(recipe, candidates, out, budget=0.99, num_samples=8)
    assert all(site["damage"] > 0 for c in found["candidates"] for site in c["sites"])
    chosen = found["chosen"]
    assert chosen["cost"] <= 0.99 + 1e-5

    goes_on = Pipeline(load_recipe(str(out / "recipe.yaml")), RunFolder(tmp_path / "run", writer=False))
    teacher = goes_on.teacher
    student = load_graft(out / "graft", base=teacher)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    plan = GraftPlan.load(out / "plan.yaml")
    paths = [s.path for s in family_of(student).sites(student) if (s.kind, s.layer) in plan.sites]
    damage = Damage(
        teacher, goes_on.data, FinetuneConfig(**stage), goes_on.compute, num_samples=8, at_once=4, seed=0
    )
    together = damage.of({path: student.get_submodule(path) for path in paths})
    assert together == pytest.approx(chosen["together"], rel=1e-4)

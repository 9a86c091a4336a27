"""A search on the tiny recipe, for the files of tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_runs import tiny_recipe

from grafting import GraftPlan, Replace
from grafting.console import Console
from grafting.recipes import load_recipe
from grafting.search import search_plan

CANDIDATES = GraftPlan([
    Replace("mha", "all", "hyena_x"),
    Replace("mha", [0, 2], "swa", {"window": 2}),
    Replace("mlp", "all", "mlp", {"ratio": 3}),
])  # fmt: skip


def searched(
    folder: Path, candidates: GraftPlan = CANDIDATES, changes: dict[str, Any] | None = None, **arguments: Any
) -> dict[str, Any]:
    """search.json of a search in `folder`/search; changes: of the recipe."""
    recipe = load_recipe(tiny_recipe(folder, **(changes or {})))
    settings: dict[str, Any] = {"console": Console(quiet=True), "num_samples": 16, **arguments}
    return search_plan(recipe, candidates, folder / "search", **settings)

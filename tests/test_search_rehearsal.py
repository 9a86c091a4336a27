"""`graft search --dry-run` says what a search then does, refuses what it would refuse, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from search_tools import CANDIDATES, searched
from tiny_runs import tiny_recipe
from typer.testing import CliRunner

from grafting import GraftPlan, Replace
from grafting.cli import app
from grafting.errors import PlanError, RunError
from grafting.recipes import load_recipe
from grafting.search import rehearse_search
from grafting.search.rehearsal import in_words


def rehearsed(folder: Path, candidates: GraftPlan = CANDIDATES, **arguments: Any) -> dict[str, Any]:
    recipe = load_recipe(tiny_recipe(folder, **arguments.pop("changes", {})))
    return rehearse_search(recipe, candidates, folder / "search", **{"num_samples": 16, **arguments})


def test_what_is_said_is_what_is_done(tmp_path: Path) -> None:
    said = rehearsed(tmp_path, at_least=2)
    assert not (tmp_path / "search").exists()
    assert [row["name"] for row in said["candidates"]] == ["01-mha-hyena_x", "02-mha-swa", "03-mlp-mlp"]
    assert [row["layers"] for row in said["candidates"]] == [[0, 1, 2, 3], [0, 2], [0, 1, 2, 3]]
    assert not any(row["done"] for row in said["candidates"])
    assert all(row["seconds"] > 0 and row["memory"]["total"] > 0 for row in said["candidates"])
    assert said["score_seconds"] > 0
    assert said["missing"] == []
    done = searched(tmp_path, at_least=2)
    sites = sum(len(candidate["sites"]) for candidate in done["candidates"])
    assert sites + len(done["curve"]) + len(done["rules"]) + 2 <= said["passes"] <= sites + 13 + 9 + 2
    for row, candidate in zip(said["candidates"], done["candidates"], strict=True):
        assert row["savings"] == pytest.approx([site["saving"] for site in candidate["sites"]])
    again = rehearsed(tmp_path, at_least=2)
    assert all(row["done"] and row["seconds"] == 0 for row in again["candidates"])
    assert "distilled already" in next(in_words(again))
    with pytest.raises(RunError, match="already holds a search"):
        rehearsed(tmp_path, at_least=2, resume=False)


def test_an_aim_that_can_not_be_met_is_refused(tmp_path: Path) -> None:
    least = rehearsed(tmp_path, at_least=1)["least_cost"]
    assert 0 < least < 1
    assert rehearsed(tmp_path, budget=least + 1e-4)["least_cost"] == pytest.approx(least, abs=1e-3)
    with pytest.raises(PlanError, match=f"the least is {least:.4f}"):
        rehearsed(tmp_path, budget=least - 0.01)
    with pytest.raises(PlanError, match="there are candidates for 8 sites"):
        rehearsed(tmp_path, at_least=9)
    with pytest.raises(PlanError, match="needs an aim"):
        rehearsed(tmp_path)


def test_without_weights(tmp_path: Path) -> None:
    """Of a model that is not here: counted and timed as its architecture; latency is left to the search."""
    candidates = GraftPlan([Replace("mlp", [0, 5], "mlp", {"ratio": 3})])
    changes = {
        "model": "arch:DiT-S/8",
        "data": str(tmp_path / "none"),
        "distill": {"steps": 2, "batch_size": 2},
    }
    said = rehearsed(tmp_path, candidates, changes=changes, at_least=1, by="latency")
    assert said["least_cost"] is None
    assert said["missing"] == [f"data: {tmp_path / 'none'}"]
    assert "measured by the search" in said["notes"][0]
    assert said["candidates"][0]["seconds"] > 0
    words = list(in_words(said))
    assert words[0].startswith("01-mlp-mlp: 2 layers; stage 1 ")
    assert not any(line.startswith("aim") for line in words)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    CANDIDATES.save(tmp_path / "candidates.yaml")
    arguments = ["search", str(tmp_path / "recipe.yaml"), "--candidates", str(tmp_path / "candidates.yaml"),
                 "--replace", "2", "--num", "16", "--out", str(tmp_path / "out"), "--dry-run"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "aim: at least 2 operators replaced: can be met" in result.stdout
    assert "03-mlp-mlp: 4 layers, saves" in result.stdout
    assert not (tmp_path / "out").exists()
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert shown["candidates"][1]["layers"] == [0, 2]
    assert shown["num_samples"] == 16

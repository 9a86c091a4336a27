"""A search that goes on: what is not done again, what is refused, and who may write."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from search_tools import CANDIDATES, searched
from several import held
from tiny_runs import tiny_recipe

from grafting import GraftPlan, Replace
from grafting.console import Console
from grafting.errors import RunError
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe
from grafting.runs import RunFolder
from grafting.search.scores import Scores

HYENA = GraftPlan([Replace("mha", "all", "hyena_x", train=False)])  # nothing to distill


def test_damages_that_were_measured_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = searched(tmp_path / "whole", HYENA, at_least=2)
    kept: list[str] = []
    keep = Scores.keep

    def stop_after_three(scores: Scores, path: str, damage: float) -> None:
        keep(scores, path, damage)
        kept.append(path)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Scores, "keep", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", HYENA, at_least=2)
    found = searched(tmp_path / "cut", HYENA, at_least=2)
    assert kept == [f"blocks.{layer}.attn" for layer in range(4)]  # each once
    assert found["candidates"] == whole["candidates"]
    assert found["chosen"] == whole["chosen"]
    searched(tmp_path / "cut", HYENA, budget=0.99)  # another aim
    assert len(kept) == 4
    searched(tmp_path / "cut", HYENA, at_least=2, num_samples=8)  # another measure
    assert len(kept) == 8
    (tmp_path / "cut" / "search" / "candidates" / "01-mha-hyena_x" / "damage.json").write_text("{")
    searched(tmp_path / "cut", HYENA, at_least=2, num_samples=8)
    assert len(kept) == 12


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path))
    run = RunFolder.create(tmp_path / "search", recipe.to_dict(), Console(quiet=True))
    Pipeline(recipe, run).graft()
    before = {path: path.read_bytes() for path in (tmp_path / "search").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="holds no search"):
        searched(tmp_path, HYENA, at_least=2)
    assert before == {path: path.read_bytes() for path in (tmp_path / "search").rglob("*") if path.is_file()}


def test_a_search_that_is_there_can_be_refused(tmp_path: Path) -> None:
    searched(tmp_path, HYENA, at_least=2, resume=False)
    with pytest.raises(RunError, match="already holds a search; go on with --resume"):
        searched(tmp_path, HYENA, at_least=2, resume=False)


def test_a_candidate_that_has_changed_is_refused_before_any_is_distilled(tmp_path: Path) -> None:
    searched(tmp_path, at_least=1)
    candidates = tmp_path / "search" / "candidates"
    shutil.rmtree(candidates / "01-mha-hyena_x")
    with pytest.raises(RunError, match=r"03-mlp-mlp.*another recipe"):
        searched(
            tmp_path,
            GraftPlan([*CANDIDATES.entries[:2], Replace("mlp", "all", "mlp", {"ratio": 2})]),
            at_least=1,
        )
    assert not (candidates / "01-mha-hyena_x" / "metrics.jsonl").exists()


def test_data_that_have_changed_are_refused_though_all_is_distilled(tmp_path: Path) -> None:
    candidates = GraftPlan([Replace("mha", [1], "hyena_x")])
    searched(tmp_path, candidates, at_least=1)
    x = np.random.default_rng(1).normal(size=(80, 1, 8, 8)).clip(-1, 1)
    np.savez(tmp_path / "data.npz", arr_0=x.astype(np.float32), arr_1=np.arange(80) % 4)
    with pytest.raises(RunError, match="no longer what this run began with"):
        searched(tmp_path, candidates, at_least=1)


def test_a_folder_has_one_search_at_a_time(tmp_path: Path) -> None:
    searched(tmp_path, HYENA, at_least=2)
    with held(tmp_path / "search") as other, pytest.raises(RunError, match=f"in use by process {other.pid}"):
        searched(tmp_path, HYENA, at_least=1)

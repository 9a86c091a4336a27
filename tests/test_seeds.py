"""Seeds: a stage has the run's unless it states one; the same seed gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import tiny_pipeline, tiny_recipe

from grafting import pipeline as pipelines
from grafting.console import Console
from grafting.errors import RunError
from grafting.recipes import load_recipe
from grafting.runs import RunFolder
from grafting.studies import stage_1
from grafting.training.config import DistillConfig, seeded


def test_a_stage_has_the_seed_of_the_run_unless_it_states_one() -> None:
    assert DistillConfig().seed is None
    assert [seeded(DistillConfig(seed=given), 5).seed for given in (None, 0, 3)] == [5, 0, 3]


@pytest.mark.parametrize(("given", "expected"), [(None, 7), (0, 0), (3, 3)])
def test_an_explicit_seed_of_0_holds_in_a_run_and_in_a_row_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int
) -> None:
    seen: list[int | None] = []

    def note(*parts: Any, **kwargs: Any) -> Any:
        seen.append(next(part.seed for part in parts if hasattr(part, "seed")))
        raise RunError("enough")

    monkeypatch.setattr(pipelines, "distill", note)
    monkeypatch.setattr(pipelines, "finetune", note)
    monkeypatch.setattr(stage_1, "operator_keys", lambda edits, config, *rest: note(config))
    pipeline = tiny_pipeline(tmp_path, seed=7, distill={"seed": given}, finetune={"seed": given})
    shelf: Any = SimpleNamespace()
    for stage in (pipeline.distill, pipeline.finetune, lambda: stage_1.shared_stage_1(pipeline, shelf)):
        with pytest.raises(RunError, match="enough"):
            stage()
    assert seen == [expected] * 3


def test_a_run_of_the_version_before_goes_on(tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, seed=7)).to_dict()
    old = json.loads(json.dumps(recipe))
    old["distill"]["seed"] = old["finetune"]["seed"] = 0
    del old["distill"]["max_bad_steps"]  # a setting that came later
    folder, console = tmp_path / "run", Console(quiet=True)
    RunFolder.create(folder, old, console)._lock.release()
    with pytest.raises(RunError, match=r"another recipe \(different: distill\.seed, finetune\.seed\)"):
        RunFolder.create(folder, recipe, console, resume=True)
    state = (folder / "run.json").read_text()
    (folder / "run.json").write_text(state.replace('"version": 2', '"version": 1'))
    RunFolder.create(folder, recipe, console, resume=True)
    assert RunFolder.open(folder).recipe() == recipe


def files(folder: Path) -> dict[str, bytes]:
    """Weights, samples and logs of a run."""
    kinds = (".safetensors", ".npz", ".jsonl", ".yaml")
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in kinds}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    """The model's names of files hold a hash, so equal names are equal weights too."""
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_pipeline(tmp_path, name, seed=seed).all()
        found[name] = files(tmp_path / name)
    assert found["a"] == found["b"]
    assert {"teacher.npz", "student.npz", "metrics.jsonl"} <= found["a"].keys()
    assert sum(name.endswith(".safetensors") for name in found["a"]) == 1
    for name in ("teacher.npz", "student.npz", "metrics.jsonl"):
        assert found["a"][name] != found["c"][name]
    assert found["a"].keys() != found["c"].keys()


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"torch": "2.9", "gpu": "NVIDIA H100"}, "This run used a GPU, whose kernels may add in another order each time"),
     ({"torch": "2.9"}, "the graft and the samples come out the same to the byte"), (None, "same to the byte")],
)  # fmt: skip
def test_the_report_says_what_was_not_deterministic(environment: Any, said: str) -> None:
    from grafting.report.page import determinism

    page = determinism(environment)
    assert said in page
    assert "Wall times are never the same twice." in page

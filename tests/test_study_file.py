"""A study of one's own, from a file: rows by what they change, seeds, claims, and what is said of mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import Graft, caller
from study_tools import QUICK, make_world

from grafting.errors import RunError
from grafting.recipes.rows import row_recipe
from grafting.studies import load_study

ROWS = {
    "window": {"plan": [{"replace": {"target": "mha", "layers": [1, 2], "with": {"swa": {"window": 1}}}}]},
    "hyena": {"label": "Hyena", "plan": [{"replace": {"target": "mha", "layers": [1, 2], "with": "hyena_x"}}]},
    "short": {"plan": [{"replace": {"target": "mha", "layers": [1, 2], "with": "hyena_x"}}],
              "finetune": {"steps": 1}},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Graft:
    return caller(tmp_path, monkeypatch, capsys)


def study_file(folder: Path, **content: Any) -> Path:
    path = folder / "mixers.yaml"
    given = {"rows": ROWS} if "rowz" not in content else {}
    path.write_text(json.dumps({**given, **content}))  # JSON is YAML, without anchors
    return path


def world_recipe(folder: Path) -> dict[str, Any]:
    world = make_world(folder / "world")
    stage = yaml.safe_load("{" + ", ".join(text.replace("=", ": ") for text in QUICK) + "}")
    return {
        "model": str(world / "model"), "data": str(world / "data.npz"), "distill": {**stage, "fit_samples": 8},
        "finetune": stage, "sample": {"num": 6, "steps": 1},
        "evaluate": {"reference": str(world / "data.npz")},
    }  # fmt: skip


def test_rows_seeds_and_claims(tmp_path: Path) -> None:
    claims = [{"text": "Hyena is better", "better": ["hyena"], "worse": ["window", "short"]}]
    path = study_file(
        tmp_path, seeds=2, noise_seeds=3, claims=claims, recipe={"model": "dit-fashion"}, title="Mixers"
    )
    study = load_study(path)
    assert (study.name, study.title, study.source) == ("mixers", "Mixers", str(path))
    assert [row.name for row in study.rows] == [
        "teacher", "teacher-noise-1", "teacher-noise-2",
        "window-s0", "window-s1", "hyena-s0", "hyena-s1", "short-s0", "short-s1",
    ]  # fmt: skip
    assert [row.seed for row in study.rows] == [0, 1, 2, 0, 1, 0, 1, 0, 1]
    assert study.row("hyena-s1").label == "Hyena, seed +1"
    (claim,) = study.claims
    assert claim.groups == (("hyena-s0", "hyena-s1"), ("window-s0", "window-s1", "short-s0", "short-s1"))
    assert not claim.paper
    assert len(load_study(study_file(tmp_path, seeds=5)).rows) == 5 + 15  # a teacher for each seed of noise


def test_a_row_is_the_shared_recipe_with_its_changes(tmp_path: Path) -> None:
    shared = {"model": "dit-fashion", "data": "fashion-10", "preset": "small", "finetune": {"lr": 0.002}}
    study = load_study(study_file(tmp_path, recipe=shared))
    recipe = row_recipe(study, study.row("short"), {}, study.base)
    assert recipe.finetune is not None
    assert (recipe.finetune.steps, recipe.finetune.lr) == (1, 0.002)
    assert recipe.plan == ROWS["short"]["plan"]
    assert recipe.fraction == 1.0  # the shares of the paper's studies are theirs
    named = load_study(study_file(tmp_path, recipe="demo"))
    assert (named.recipe, named.base) == ("demo", None)


@pytest.mark.parametrize(("content", "message"), [
    ({"rows": {}}, "rows"),
    ({"rowz": ROWS}, "unknown key 'rowz'; did you mean 'rows'?"),
    ({"rows": {"a b": {}}}, "a row's name is a folder's"),
    ({"rows": {"../up": {}}}, "a row's name is a folder's"),
    ({"rows": {"teacher-x": {}}}, "rows of the teacher come by themselves"),
    ({"rows": {"a": {"plam": []}}}, "row 'a': unknown key 'plam'; did you mean 'plan'?"),
    ({"rows": {"a": {"seed": "one"}}}, "seed is a whole number"),
    ({"claims": [{"text": "x", "better": ["hyene"], "worse": ["window"]}]}, "'hyene', which is no row; did you mean"),
    ({"claims": [{"text": "x", "better": [], "worse": ["window"]}]}, "better"),
    ({"seeds": 0}, "seeds"),
])  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = study_file(tmp_path, **content)
    with pytest.raises(RunError) as caught:
        load_study(path)
    assert message in str(caught.value)
    assert "mixers.yaml" in str(caught.value)


def test_the_command(run: Graft, tmp_path: Path) -> None:
    claims = [{"text": "More steps help", "better": ["hyena"], "worse": ["short"]}]
    path = study_file(tmp_path, recipe=world_recipe(tmp_path), noise_seeds=2, claims=claims)
    code, out, _ = run("study", str(path), "--dry-run")
    assert code == 0
    assert "5 of 5 rows to do" in out
    assert not (tmp_path / "cwd" / "runs").exists()
    code, out, error = run("study", str(path))
    assert (code, error.count("error")) == (0, 0), error
    folder = tmp_path / "cwd" / "runs" / "study-mixers"
    found = json.loads((folder / "study.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        "teacher",
        "teacher-noise-1",
        "window",
        "hyena",
        "short",
    ]
    assert all(row["distance"] is not None for row in found["rows"])
    assert found["command"] == f"graft study {path} --seed 0"
    assert found["claims"][0]["own"]
    assert (folder / "study.html").is_file()
    code, _, error = run("study", str(path))
    assert code != 0
    assert "--resume" in error
    code, _, error = run("study", "mixerz.yaml")
    assert code != 0
    assert "or the file of a study of your own" in error


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "studies" / "README.md").read_text(
        encoding="utf-8"
    )
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    (tmp_path / "mixers.yaml").write_text(example)
    study = load_study(tmp_path / "mixers.yaml")
    recipes = {row.name: row_recipe(study, row, {}, study.base, 0) for row in study.rows}
    assert len(recipes) == 4 + 9
    long = recipes["hyena-long-s2"].finetune
    assert long is not None
    assert (long.steps, recipes["hyena-long-s2"].seed) == (940, 2)
    short = recipes["hyena-s0"].finetune
    assert short is not None
    assert short.steps == 470  # table4's

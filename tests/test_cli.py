"""The command line as a person meets it: help, JSON that is JSON, and each verb from one to the next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import Graft, caller, contents, make_world, start
from conftest import FIXTURES, prediction
from safetensors.torch import load_file

import grafting
from grafting import cli, load_model
from grafting.errors import RunError
from grafting.yaml_io import load_yaml


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Graft:
    """Call `graft` in this process, in an empty folder: (exit status, stdout, stderr)."""
    return caller(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


# ---- what is printed


def test_help_is_everywhere(run: Graft) -> None:
    code, text, _ = run("--help")
    assert code == 0
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        assert name in text
        assert run(name, "--help")[0] == 0
    for group in ((), ("geneval",)):  # without a verb: the help too
        code, text, stderr = run(*group)
        assert (code in (0, 2), stderr) == (True, "")
        assert text.startswith("Usage: ")
        assert "\nCommands:\n" in text
    assert run("--version") == (0, f"graft {grafting.__version__}\n", "")


def test_every_verb_that_loads_or_runs_something_takes_the_common_options(run: Graft) -> None:
    without = {"list", "status", "report", "compare", "push"}
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        text = run(name, "--help")[1]
        has = [option for option in ("--device", "--dtype", "--seed") if f" {option} " in text]
        assert has == ([] if name in without else ["--device", "--dtype", "--seed"]), name


def test_list_explain_inspect_and_cost_as_json(run: Graft, world: Path) -> None:
    code, text, stderr = run("list", "--json")
    found = json.loads(text)
    assert (code, stderr) == (0, "")
    assert {"mha", "swa", "hyena_se", "hyena_x", "hyena_y", "mamba2", "mlp", "mlp_hyena_x"} <= set(
        found["operators"]
    )
    assert "demo" in found["recipes"]
    assert found["models"] == ["dit-fashion", "pixart-emoji"]

    found = json.loads(run("inspect", world / "graft", "--json")[1])
    assert [s["operator"] for s in found["sites"] if s["target"] == "mha"] == ["mha", "swa", "mha", "mha"]
    assert found["plan"]["entries"][0]["replace"]["layers"] == [1]
    assert json.loads(run("inspect", "arch:DiT-XL/2", "--json")[1])["params"] == 675_129_632
    assert json.loads(run("inspect", world / "model.pt", "--num-heads", 4, "--json")[1])["plan"] is None

    found = json.loads(run("explain", world / "model", "--plan", world / "mixed.yaml", "--json")[1])
    assert [(e["layer"], e["target"], e["from"], e["to"]) for e in found["edits"]] == [
        (0, "mlp", "mlp", "mlp"), (1, "mha", "mha", "hyena_x"), (2, "mlp", "mlp", "mlp"), (3, "mha", "mha", "hyena_x"),
    ]  # fmt: skip
    before, after = found["model"]["params"]
    assert after - before == sum(e["params"][1] - e["params"][0] for e in found["edits"])
    text = run("explain", world / "model", "--plan", world / "mixed.yaml")[1]
    assert "hyena_x" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


# ---- the verbs


def test_import_and_export(run: Graft, world: Path, tmp_path: Path) -> None:
    source = FIXTURES / "published_format_grafted_hyena_x.pt"
    code, text, _ = run("import", source, "--out", tmp_path / "g", "--num-heads", 4)
    assert code == 0
    assert "replace mha in layers 1,3 with hyena_x" in text.replace("1, 3", "1,3")
    imported = load_model(tmp_path / "g")
    assert run("export", tmp_path / "g", "--out", tmp_path / "again.pt")[0] == 0
    assert run("import", tmp_path / "again.pt", "--out", tmp_path / "g2", "--num-heads", 4)[0] == 0
    assert torch.equal(prediction(load_model(tmp_path / "g2")), prediction(imported))
    halved = [
        "import",
        source,
        "--out",
        tmp_path / "g3",
        "--num-heads",
        4,
        "--dtype",
        "bfloat16",
        "--seed",
        1,
    ]
    assert run(*halved)[0] == 0
    assert {p.dtype for p in load_model(tmp_path / "g3").parameters()} == {torch.bfloat16}
    assert run("export", world / "model", "--format", "diffusers", "--out", tmp_path / "d")[0] == 0
    assert torch.equal(prediction(load_model(tmp_path / "d")), prediction(load_model(world / "model")))


def test_apply_distill_finetune_sample_evaluate_compare(run: Graft, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    arguments = [
        "apply",
        world / "model",
        "--plan",
        world / "mixed.yaml",
        "--data",
        world / "data.npz",
        "--out",
        out,
    ]
    assert run(*arguments, "--device", "cpu", "--seed", 3)[0] == 0
    code, _, stderr = run(*arguments)
    assert (code, "--resume" in stderr, "graft distill and finetune go on with it" in stderr) == (
        2,
        False,
        True,
    )
    recipe = load_yaml(out / "recipe.yaml", "recipe", RunError)
    for stage in ("distill", "finetune"):
        recipe[stage] |= {"steps": 2, "batch_size": 8, "num_validation": 8}
    (out / "recipe.yaml").write_text(json.dumps(recipe))
    for stage in ("distill", "finetune"):
        for option, other, own in (("--seed", 4, 3), ("--dtype", "bfloat16", "float32")):
            before = contents(out)
            code, text, stderr = run(stage, out, option, other)
            assert (code, text, contents(out)) == (2, "", before)
            assert f"{option} {other}: the run in '{out}' has {option[2:]} {own};" in stderr
            assert f"graft apply {option} {other}" in stderr
        code, text, _ = run(stage, out, "--seed", 3, "--dtype", "float32")
        assert (code, text) == (0, f"{stage}: {out}\n")
        before = contents(out)
        code, _, stderr = run(stage, out)
        assert code == 2
        assert "done already" in stderr
        assert run(stage, out, "--resume") == (0, f"{stage}: {out} (done already)\n", "")
        assert contents(out) == before
    for name, seed in (("a", 0), ("b", 1)):
        code, _, _ = run(
            "sample", out, "--num", 20, "--steps", 2, "--seed", seed, "--out", tmp_path / f"{name}.npz"
        )
        assert code == 0
        code, text, _ = run("evaluate", tmp_path / f"{name}.npz", "--reference", "fashion-train", "--json",
                            "--out", tmp_path / f"{name}.json")  # fmt: skip
        assert code == 0
        assert json.loads(text) == json.loads((tmp_path / f"{name}.json").read_text())
        assert {"fd", "precision", "recall", "label_accuracy"} <= set(json.loads(text)["metrics"])
    code, text, _ = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert code == 0
    json.loads(text)
    assert run("sample", out, "--num", 20, "--steps", 3, "--out", tmp_path / "c.npz")[0] == 0
    assert (
        run("evaluate", tmp_path / "c.npz", "--reference", "fashion-train", "--out", tmp_path / "c.json")[0]
        == 0
    )
    code, _, stderr = run("compare", tmp_path / "a.json", tmp_path / "c.json")
    assert code == 2
    assert "steps" in stderr


def test_apply_makes_a_run_of_a_dtype(run: Graft, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    plan, data = world / "plan.yaml", world / "data.npz"
    arguments = [
        "apply",
        world / "model",
        "--plan",
        plan,
        "--data",
        data,
        "--out",
        out,
        "--dtype",
        "bfloat16",
    ]
    assert run(*arguments)[0] == 0
    assert load_yaml(out / "recipe.yaml", "recipe", RunError)["dtype"] == "bfloat16"
    assert {p.dtype for p in load_model(out).parameters()} == {torch.bfloat16}
    code, _, stderr = run("distill", out, "--dtype", "float32")
    assert (code, "has dtype bfloat16" in stderr) == (2, True)


def test_run_end_to_end_and_again(run: Graft, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, stderr = run("run", world / "tiny.yaml", "--out", out, "--dry-run")
    assert (code, out.exists(), stderr) == (0, False, "")
    assert "hyena_x" in text
    code, text, _ = run("run", world / "tiny.yaml", "--out", out)
    assert code == 0
    assert str(out / "report.html") in text
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["teacher"]["protocol"]["num_samples"] == 20
    code, text, _ = run("compare", out, out / "evaluation.json", "--json")
    assert code == 0
    assert json.loads(text)["metrics"]["fd"]["a"] == evaluation["student"]["metrics"]["fd"]
    before = contents(out)
    code, _, stderr = run("run", world / "tiny.yaml", "--out", out, "--resume", "--set", "distill.steps=5")
    assert code == 2
    assert (
        f"(different: distill.steps); go on with its own, which has what was set at its start (graft run {out}/rec"
        in stderr
    )
    assert run("run", out / "recipe.yaml", "--out", out, "--resume")[0] == 0
    assert set(contents(out)) == set(before)
    before = contents(out)
    code, _, stderr = run("run", world / "tiny.yaml", "--out", out)
    assert code == 2
    assert "--resume" in stderr
    code, _, stderr = run("run", world / "tiny.yaml", "--out", out, "--resume", "--set", "seed=9")
    assert code == 2
    assert "seed" in stderr
    assert contents(out) == before
    assert run("run", world / "tiny.yaml", "--out", out, "--resume")[0] == 0
    assert run("report", out)[0] == 0
    changed = {k for k, v in contents(out).items() if before[k] != v}
    assert changed <= {
        str(out / "report.html"),
        str(out / "status.json"),
    }  # the page, and when it was last touched
    assert run("inspect", out, "--json")[0] == 0


def test_a_run_that_diverges_exits_with_3_and_keeps_what_was_good(
    run: Graft, world: Path, tmp_path: Path
) -> None:
    settings = [
        "finetune.lr=1e30",
        "finetune.warmup=0",
        "finetune.max_bad_steps=1",
        "finetune.steps=40",
        "distill=null",
    ]
    arguments = ["run", world / "tiny.yaml", "--out", tmp_path / "r"]
    code, _, stderr = run(*arguments, *(part for s in settings for part in ("--set", s)))
    assert code == 3
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "diverged" in errors[0]
    assert stderr.splitlines()[-1] == errors[0]
    assert prediction(load_model(tmp_path / "r")).isfinite().all()


def test_two_processes_are_one(run: Graft, world: Path, tmp_path: Path) -> None:
    # Not dpm++, which imports all of SciPy's statistics where that is installed: seconds of each process.
    settings = ["evaluate=null", "sample.num=4", "sample.sampler=ddim"]
    arguments = ["run", world / "tiny.yaml", *(part for s in settings for part in ("--set", s)), "--out"]
    assert run(*arguments, tmp_path / "one")[0] == 0
    process = start([*arguments, tmp_path / "two", "--processes", 2])
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    states = [load_file(next((tmp_path / name).glob("graft/*.safetensors"))) for name in ("one", "two")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert (tensor - states[1][name]).abs().max() < 1e-3, name
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1])
    a, b = (np.load(tmp_path / name / "samples/student.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert np.abs(a - b).max() <= 2

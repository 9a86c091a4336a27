"""The command line as a person meets it: exit statuses, one `error:` line, nothing written, and JSON that is JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, prediction, tiny_dit
from safetensors.torch import load_file

import grafting
from grafting import GraftPlan, Replace, cli, diffusion, graft, load_model, save_graft, save_model
from grafting.errors import RunError
from grafting.evaluation import SampleFile
from grafting.formats.published import export_published
from grafting.runs import RunFolder
from grafting.yaml_io import load_yaml

Graft = Callable[..., tuple[int, str, str]]
HYENA = "- replace: {target: mha, layers: interleaved-50, with: hyena_x}\n"
QUICK = {
    "steps": 4, "batch_size": 8, "num_validation": 16, "log_every": 1, "validate_every": 2, "checkpoint_every": 2,
    "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Graft:
    """Call `graft` in this process, in an empty folder: (exit status, stdout, stderr)."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return call


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, plans and data, good and bad."""
    folder = tmp_path_factory.mktemp("world")
    teacher = tiny_dit(input_size=32, patch_size=8, num_classes=10)
    save_model(teacher, folder / "model")
    export_published(teacher, folder / "model.pt")
    student = graft(load_model(folder / "model"), GraftPlan([Replace("mha", [1], "swa")]))
    save_graft(student, folder / "graft")
    export_published(student, folder / "grafted.pt")
    save_graft(student, folder / "orphan")
    manifest = json.loads((folder / "orphan/graft.json").read_text())
    save_model(tiny_dit(seed=1, input_size=32, patch_size=8, num_classes=10), folder / "other")
    manifest["base"]["source"] = str(folder / "other")
    (folder / "orphan/graft.json").write_text(json.dumps(manifest))

    whole = (folder / "model.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    plans = {
        "plan": HYENA,
        "mixed": "- replace: {target: mlp, layers: [0, 2], with: {mlp: {ratio: 3}}, init: random, loss: l2}\n" + HYENA,
        "empty": "[]\n", "blank": "", "operator": HYENA.replace("hyena_x", "hyena_z"),
        "key": HYENA.replace("hyena_x", "{hyena_x: {kernal_size: 3}}"), "selector": HYENA.replace("50", "55"),
        "twice": HYENA + HYENA.replace("interleaved-50", "[3]"), "layer": HYENA.replace("interleaved-50", "[4]"),
        "kernel": HYENA.replace("hyena_x", "{hyena_x: {kernel_size: 0}}"),
        "window": HYENA.replace("hyena_x", "{swa: {window: -3}}"),
        "tags": HYENA + "- !!python/object/apply:os.system [ls]\n",
        "overlap": "- parallelize: {groups: [[0, 1], [1, 2]]}\n", "gap": "- parallelize: {groups: [[0, 2]]}\n",
        "beyond": "- parallelize: {groups: [[3, 4]]}\n", "local": HYENA.replace("interleaved-50", "top-local-50"),
    }  # fmt: skip
    for name, text in plans.items():
        (folder / f"{name}.yaml").write_text(text)
    images = np.random.default_rng(0).normal(size=(80, 1, 32, 32)).astype(np.float32)
    labels = np.arange(80) % 10
    np.savez(folder / "data.npz", arr_0=images, arr_1=labels)
    np.savez(folder / "nan.npz", arr_0=np.where(images > 2, np.nan, images), arr_1=labels)
    np.savez(folder / "wide.npz", arr_0=images.reshape(40, 2, 32, 32), arr_1=labels[:40])
    np.savez(folder / "classes.npz", arr_0=images, arr_1=labels + 1)
    recipe = {
        "name": "tiny", "model": str(folder / "model"), "data": str(folder / "data.npz"),
        "plan": [{"replace": {"target": "mha", "layers": "interleaved-50", "with": "hyena_x"}}],
        "distill": QUICK, "finetune": QUICK,
        "sample": {"num": 20, "steps": 2, "sampler": "dpm++"},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(json.dumps(recipe))
    return folder


def contents(*folders: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


# ---- bad input


def bad_inputs() -> list[tuple[str, list[str], str]]:
    """(name, arguments, word of the error); {w} is the folder of the fixture, {o} an empty one."""
    explain = ["explain", "{w}/model", "--plan"]
    plans = {
        "empty": "no entries", "blank": "plan", "operator": "hyena_z", "key": "kernal_size",
        "selector": "interleaved-55",
        "twice": "layer 3", "layer": "layer 4", "kernel": "kernel_size=0", "window": "window=-3", "tags": "tag",
        "overlap": "layer 1: in two groups", "gap": "layer 1 lies between", "beyond": "4",
        "local": "graft locality", "missing": "missing.yaml",
    }  # fmt: skip
    cases = [(f"plan {name}", [*explain, f"{{w}}/{name}.yaml"], word) for name, word in plans.items()]
    apply = ["apply", "{w}/model", "--data", "{w}/data.npz", "--out"]
    cases += [
        (f"apply plan {name}", [*apply, "{o}/x", "--plan", f"{{w}}/{name}.yaml"], word)
        for name, word in plans.items()
    ]  # fmt: skip
    cases += [
        (f"file {n}", ["inspect", f"{{w}}/{n}.pt", "--num-heads", "4"], n) for n in ("cut", "empty", "none")
    ]
    run = ["run", "{w}/tiny.yaml", "--out", "{o}/x"]
    for name, word in (
        ("nan", "not finite"),
        ("wide", "shape"),
        ("classes", "classes"),
        ("none", "none.npz"),
    ):
        cases.append((f"data {name}", [*run, "--set", f"data={{w}}/{name}.npz"], word))
    sample = ["sample", "{w}/model", "--num", "4", "--steps", "2", "--out"]
    cases += [
        ("grafted file", ["inspect", "{w}/grafted.pt", "--num-heads", "4"], "graft import"),
        ("heads unknown", ["inspect", "{w}/model.pt"], "num_heads"),
        ("heads wrong", ["inspect", "{w}/model.pt", "--num-heads", "5"], "num_heads=5"),
        ("heads zero", ["inspect", "{w}/model.pt", "--num-heads", "0"], "num-heads"),
        ("wrong base", ["sample", "{w}/orphan", "--num", "4", "--out", "{o}/x.npz"], "another base"),
        ("no such model", ["inspect", "nothing"], "nothing"),
        ("no such architecture", ["inspect", "arch:DiT-M/2"], "DiT-M/2"),
        ("no such recipe", ["run", "nothing.yaml", "--out", "{o}/x"], "demo"),
        ("no such command", ["grapht"], "grapht"),
        ("no such option", ["list", "--colour"], "--colour"),
        ("missing option", ["explain", "{w}/model"], "--plan"),
        ("no such setting", [*run, "--set", "distill.stepps=3"], "stepps"),
        ("setting out of range", [*run, "--set", "distill.lr=-1"], "lr"),
        ("no such reference", [*run, "--set", "evaluate.reference=no.npz"], "no.npz"),
        ("no such device", [*run, "--device", "quantum"], "quantum"),
        ("device not here", [*run, "--device", "cuda:99"], "cuda:99"),
        ("sample on a device not here", [*sample, "{o}/x.npz", "--device", "cuda:99"], "cuda:99"),
        ("no such dtype", [*run, "--dtype", "int3"], "int3"),
        ("inspect in no dtype", ["inspect", "arch:DiT-S/2", "--dtype", "int3"], "int3"),
        ("explain on no device", [*explain, "{w}/plan.yaml", "--device", "quantum"], "quantum"),
        ("apply in no dtype", [*apply, "{o}/x", "--plan", "{w}/plan.yaml", "--dtype", "int3"], "int3"),
        ("apply on no device", [*apply, "{o}/x", "--plan", "{w}/plan.yaml", "--device", "cuda:99"], "cuda:99"),
        ("export on no device", ["export", "{w}/model", "--out", "{o}/x.pt", "--device", "quantum"], "quantum"),
        ("evaluate in no dtype", ["evaluate", "{w}/none.npz", "--reference", "x", "--dtype", "int3"], "int3"),
        ("sample where a file is", [*sample, "{w}/plan.yaml/x.npz"], "plan.yaml"),
        ("sample to no npz", [*sample, "{o}/x.png"], "npz"),
        ("sampler", [*sample, "{o}/x.npz", "--sampler", "euler"], "euler"),
        ("labels", [*sample, "{o}/x.npz", "--labels", "3,10"], "no class 10"),
        ("labels of no form", [*sample, "{o}/x.npz", "--labels", "cat"], "--labels 'cat'"),
        ("guidance", [*sample, "{o}/x.npz", "--guidance", "nan"], "guidance"),
        ("run where a file is", ["run", "{w}/tiny.yaml", "--out", "{w}/plan.yaml/x"], "can't write"),
        ("run on a file", ["run", "{w}/tiny.yaml", "--out", "{w}/plan.yaml"], "plan.yaml"),
        ("run on other things", ["run", "{w}/tiny.yaml", "--out", "{w}"], "holds no run"),
        ("resume of other things", ["run", "{w}/tiny.yaml", "--out", "{w}", "--resume"], "holds no run"),
        ("apply on other things", [*apply, "{w}", "--plan", "{w}/plan.yaml"], "holds no run"),
        ("import on other things", ["import", "{w}/grafted.pt", "--num-heads", "4", "--out", "{w}"], "not an empty"),
        ("import without heads", ["import", "{w}/grafted.pt", "--out", "{o}/x"], "num_heads"),
        ("import of a cut file", ["import", "{w}/cut.pt", "--num-heads", "4", "--out", "{o}/x"], "cut.pt"),
        ("export of nothing", ["export", "nothing", "--out", "{o}/x.pt"], "nothing"),
        ("export format", ["export", "{w}/model", "--format", "onnx", "--out", "{o}/x.pt"], "onnx"),
        ("export of a graft", ["export", "{w}/graft", "--format", "diffusers", "--out", "{o}/x"], "save_graft"),
        ("distill of no run", ["distill", "{o}"], "run.json"),
        ("finetune of no run", ["finetune", "{w}/model"], "run.json"),
        ("report of no run", ["report", "{o}"], "run.json"),
        ("evaluate no samples", ["evaluate", "{w}/none.npz", "--reference", "fashion-train"], "none.npz"),
        ("compare no evaluations", ["compare", "{w}/tiny.yaml", "{w}/none.json"], ""),
    ]  # fmt: skip
    return cases


@pytest.mark.parametrize(("arguments", "word"), [pytest.param(a, w, id=n) for n, a, w in bad_inputs()])
def test_bad_input_is_one_line_and_exit_2_and_writes_nothing(
    run: Graft, world: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    before = contents(world)
    code, stdout, stderr = run(*(a.replace("{w}", str(world)).replace("{o}", str(out)) for a in arguments))
    assert code == 2, stderr
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert word in stderr
    assert contents(world) == before
    assert list(out.iterdir()) == []
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_pickle_with_code_is_not_run(run: Graft, tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {mark}",))

    torch.save({"ema": tiny_dit().state_dict(), "args": Payload()}, tmp_path / "x.pt")
    for arguments in (
        ["inspect", tmp_path / "x.pt", "--num-heads", 4],
        ["import", tmp_path / "x.pt", "--num-heads", 4, "--out", tmp_path / "g"],
        ["sample", tmp_path / "x.pt", "--num", 4, "--out", tmp_path / "s.npz", "--num-heads", 4],
    ):
        code, _, stderr = run(*arguments)
        assert (code, stderr.count("\n")) == (2, 1)
        assert "nothing of it was executed" in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "x.pt"]


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
    arguments = ["run", world / "tiny.yaml", "--set", "evaluate=null", "--set", "sample.num=4", "--out"]
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "operators"],
        ["run", "demo", "--dry-run"],
        ["apply", "dit-fashion", "--out", "r", "--plan", "p.yaml"],
    ],
    ids=["bench", "dry-run", "apply"],
)
def test_work_for_one_process_is_refused_in_several(
    run: Graft, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """They would compute together without knowing it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, stderr = run(*arguments)
    assert status == 2
    assert "is work for one process, and this is one of 2 that were started together" in stderr
    assert list(Path().iterdir()) == []


# ---- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_sampling_leaves_whole_batches_and_the_command_goes_on(
    run: Graft,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return diffusion.sample(*arguments, **options)

    monkeypatch.setattr("grafting.generation.sample", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    out = tmp_path / "out"
    command = ("sample", world / "model", "--num", 8, "--batch-size", 4, "--steps", 2, "--precision", "bf16")
    code, stdout, stderr = run(*command, "--out", out / "x.npz")
    signal.signal(signal.SIGINT, ours)
    assert (code, stdout) == (status, "")
    assert stderr.splitlines()[-1] in ("error: interrupted", "error: terminated")
    assert sorted(path.name for path in out.rglob("*")) == [".x.parts", "000000.npy", "parts.json"]
    assert run(*command, "--out", out / "x.npz")[0] == 0
    assert len(calls) == 3  # the first batch is not drawn again
    assert sorted(path.name for path in out.iterdir()) == ["x.npz", "x.png"]
    assert run(*command, "--out", out / "y.npz")[0] == 0
    assert (out / "x.npz").read_bytes() == (out / "y.npz").read_bytes()
    assert SampleFile.open(out / "x.npz").protocol["precision"] == "bf16"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_signal_ends_a_stage_at_once(tmp_path: Path) -> None:
    folder, seen = RunFolder(tmp_path), []
    with pytest.raises(KeyboardInterrupt), folder.stoppable():  # noqa: PT012
        assert folder.stop_requested() is None
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(folder.stop_requested())
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("never")
    assert seen == [143]


def start(arguments: list[Any]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, "-m", "grafting", *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "status", "stage"), [(signal.SIGINT, 130, "distill"), (signal.SIGTERM, 143, "finetune")]
)
def test_a_signal_stops_with_a_checkpoint_and_resume_gives_the_same_bytes(
    run: Graft, world: Path, tmp_path: Path, number: signal.Signals, status: int, stage: str
) -> None:
    settings = [
        "evaluate=null",
        f"{stage}.steps=200",
        f"{stage}.checkpoint_every=5",
        f"{stage}.validate_every=100",
    ]
    arguments = ["run", world / "tiny.yaml", *(part for s in settings for part in ("--set", s)), "--out"]
    process = start([*arguments, tmp_path / "cut"])
    checkpoints = tmp_path / "cut/checkpoints" / stage
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith("error: stopped at step")
    assert sum(line.startswith("error:") for line in stderr.splitlines()) == 1
    assert "Traceback" not in stderr
    assert list(checkpoints.glob("*.pt"))
    assert run(*arguments, tmp_path / "cut", "--resume")[0] == 0
    assert run(*arguments, tmp_path / "whole")[0] == 0
    for pattern in ("graft/*.safetensors", "metrics.jsonl", "plan.yaml"):
        a, b = (next((tmp_path / name).glob(pattern)) for name in ("cut", "whole"))
        assert a.read_bytes() == b.read_bytes(), pattern

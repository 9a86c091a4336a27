"""Bad input to the command line: one `error:` line, exit status 2, nothing written, nothing executed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Graft, caller, contents, make_world
from conftest import tiny_dit


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Graft:
    """Call `graft` in this process, in an empty folder: (exit status, stdout, stderr)."""
    return caller(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def bad_inputs() -> list[tuple[str, list[str], str]]:
    """(name, arguments, word of the error); {w} is the folder of the fixture, {o} an empty one."""
    explain = ["explain", "{w}/model", "--plan"]
    pairs = ["synthesize", "dit-fashion", "--out", "{o}/x"]
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
        ("import without heads", ["import", "{w}/grafted.pt", "--out", "{o}/x"], "num_heads= (--num-heads)"),
        ("import of a cut file", ["import", "{w}/cut.pt", "--num-heads", "4", "--out", "{o}/x"], "cut.pt"),
        ("export of nothing", ["export", "nothing", "--out", "{o}/x.pt"], "nothing"),
        ("export format", ["export", "{w}/model", "--format", "onnx", "--out", "{o}/x.pt"], "onnx"),
        ("export of a graft", ["export", "{w}/graft", "--format", "diffusers", "--out", "{o}/x"], "--format graft"),
        ("pipeline of classes", ["export", "{w}/graft", "--format", "pipeline", "--out", "{o}/x"], "of classes"),
        ("synthesis of classes", [*pairs, "--prompts", "{w}/none.txt", "--num", "2"], "dit-fashion' makes"),
        ("a recipe as a plan", ["explain", "{w}/model", "--plan", "{w}/tiny.yaml"], "looks like a recipe"),
        ("no such data", [*run, "--set", "data=/no/such"], "of latents (graft encode) or of pairs (graft synthesize)"),
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

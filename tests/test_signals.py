"""Signals: whole batches and checkpoints stay, the exit status says which it was, and going on gives the same bytes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Graft, caller, make_world, start

from grafting import diffusion
from grafting.evaluation import SampleFile
from grafting.runs import RunFolder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Graft:
    """Call `graft` in this process, in an empty folder: (exit status, stdout, stderr)."""
    return caller(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


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


@pytest.mark.parametrize(
    ("number", "status", "stage"), [(signal.SIGINT, 130, "distill"), (signal.SIGTERM, 143, "finetune")]
)
def test_a_signal_stops_with_a_checkpoint_and_resume_gives_the_same_bytes(
    run: Graft, world: Path, tmp_path: Path, number: signal.Signals, status: int, stage: str
) -> None:
    settings = [
        "evaluate=null",
        f"{stage}.steps=100",
        f"{stage}.checkpoint_every=10",
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

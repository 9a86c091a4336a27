"""Checkpoints written while training goes on: the same bytes, the state of their step, no error lost, killed inside."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from several import status_of
from torch import nn

from grafting import GraftPlan, Replace, distill, finetune, graft
from grafting.data import ImageLabelDataset
from grafting.errors import CheckpointError, DivergedError, Interrupted
from grafting.runs import RunFolder
from grafting.training.loop import Clock, Quiet
from grafting.training.saving import CheckpointWriter, snapshot

PATIENCE = 60.0
STAGE: dict[str, Any] = {
    "precision": "fp32", "batch_size": 4, "num_validation": 4, "steps": 6, "warmup": 2, "lr": 1e-3, "log_every": 1,
    "validate_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9,
}  # fmt: skip
PLAN = GraftPlan([Replace("mha", [1], "hyena_x"), Replace("mlp", [0], "mlp", {"ratio": 2}, init="random")])


def train(stage: str, journal: Any, **changes: Any) -> nn.Module:
    """The stage on a tiny DiT and 40 images."""
    teacher = tiny_dit()
    student, config = graft(teacher, PLAN), {**STAGE, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = ImageLabelDataset(torch.randn(40, 1, 8, 8), torch.arange(40) % 4)
    if stage == "distill":
        distill(student, teacher, data, {**config, "fit_samples": 8}, journal=journal)
    else:
        finetune(student, data, config, journal=journal)
    return student


def folder(path: Path) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    return RunFolder(path)


class Slow(RunFolder):
    """A run folder whose checkpoints wait until training is two steps further, or at its end."""

    def __init__(self, path: Path, steps: int) -> None:
        path.mkdir(parents=True)
        super().__init__(path)
        self.steps, self.behind, self.writers = steps, list[int](), set[str]()
        self._at, self._moved = 0, threading.Condition()

    def log(self, record: Any) -> None:
        super().log(record)
        with self._moved:
            self._at = record["step"]
            self._moved.notify_all()

    def save_checkpoint(self, stage: str, step: int, state: Any, keep: int) -> None:
        with self._moved:
            assert self._moved.wait_for(lambda: self._at >= min(step + 1, self.steps), PATIENCE)
            self.behind.append(self._at - step)
        self.writers.add(threading.current_thread().name)
        super().save_checkpoint(stage, step, state, keep)


def kept(path: Path, stage: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((path / "checkpoints" / stage).iterdir())}


@pytest.mark.parametrize("stage", ["distill", "finetune"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_written_late_a_checkpoint_has_the_bytes_that_it_has_when_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, optimizer: str
) -> None:
    """Training goes on by a step, which changes every weight and moment in place, before anything is written."""
    monkeypatch.setattr(Clock, "seconds", 1.0)
    late = Slow(tmp_path / "late", STAGE["steps"])
    train(stage, late, optimizer=optimizer)
    assert all(steps >= 1 for steps in late.behind[:-1])  # more where this thread was slow to wake
    assert late.behind[-1] == 0
    assert late.writers == {"grafting-checkpoint"}

    def save(self: CheckpointWriter, step: int, state: Any, given: Any = ()) -> None:
        self.journal.save_checkpoint(self.stage, step, state, self.keep)

    monkeypatch.setattr(CheckpointWriter, "save", save)
    train(stage, folder(tmp_path / "plain"), optimizer=optimizer)
    found, wanted = kept(tmp_path / "late", stage), kept(tmp_path / "plain", stage)
    assert list(found) == [f"{step:09d}.{kind}" for step in (2, 4, 6) for kind in ("json", "pt")]
    assert found == wanted


def test_a_snapshot_shares_nothing_and_keeps_what_a_state_dict_carries() -> None:
    state = {"a": nn.Linear(2, 2).state_dict(), "b": [torch.ones(2), (torch.zeros(1), 3)], "c": {1: [1, 2]}}
    found, copying = snapshot(state)
    assert copying == []
    torch.testing.assert_close(found, state, rtol=0, atol=0)
    assert found["a"]._metadata == state["a"]._metadata
    assert type(found["a"]) is type(state["a"])
    state["a"]["weight"].zero_()
    state["b"][0].zero_()
    state["c"][1].append(3)
    assert found["a"]["weight"].abs().min() > 0
    assert found["b"][0].tolist() == [1, 1]
    assert found["c"] == {1: [1, 2]}
    given = torch.ones(2)
    own = snapshot({"given": given, "other": torch.ones(2)}, [given])[0]
    assert own["given"] is given  # on the host already, and nobody else's


class Recorder(Quiet):
    """Counts the writes that overlap; each waits for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.begun = threading.Event(), threading.Event()
        self.now, self.most, self.steps = 0, 0, list[int]()

    def save_checkpoint(self, stage: str, step: int, state: Any, keep: int) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.set()
        assert self.go.wait(PATIENCE)
        self.steps.append(step)
        self.now -= 1


def test_one_is_written_at_a_time_and_the_end_waits_for_the_last() -> None:
    journal = Recorder()
    with CheckpointWriter(journal, "s", 2) as writer:
        writer.save(1, {"step": 1})
        assert journal.begun.wait(PATIENCE)
        assert journal.steps == []
        threading.Timer(0.05, journal.go.set).start()
        writer.save(2, {"step": 2})
        assert journal.steps[:1] == [1]
    assert journal.steps == [1, 2]
    assert journal.most == 1


def test_nothing_is_copied_for_a_journal_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("grafting.training.saving.snapshot", refuse)
    for journal in (Quiet(), RunFolder("nowhere", writer=False)):
        with CheckpointWriter(journal, "s", 2) as writer:
            writer.save(1, {"step": 1})
    with pytest.raises(AssertionError), CheckpointWriter(Recorder(), "s", 2) as writer:
        writer.save(1, {"step": 1})


class Full(RunFolder):
    """A disk that is full from the given step on."""

    full_at = 0
    stop_at = 10**9
    looks = 0

    def save_checkpoint(self, stage: str, step: int, state: Any, keep: int) -> None:
        if step >= self.full_at:
            raise CheckpointError(f"step {step}: No space left on device")
        super().save_checkpoint(stage, step, state, keep)

    def stop_requested(self) -> int | None:
        self.looks += 1
        return 143 if self.looks > self.stop_at else None


@pytest.mark.parametrize("stage", ["distill", "finetune"])
@pytest.mark.parametrize(
    ("full_at", "logged", "stop_at"),
    [(2, 4, 10**9), (6, 6, 10**9), (3, 3, 3), (2, 3, 3)],
    ids=["at the next", "at the end", "at a stop", "at a stop, of the one before"],
)
def test_an_error_of_the_writer_is_raised(
    tmp_path: Path, stage: str, full_at: int, logged: int, stop_at: int
) -> None:
    journal = Full(tmp_path)
    journal.full_at, journal.stop_at = full_at, stop_at
    with pytest.raises(CheckpointError, match=f"^step {full_at}: No space left on device$"):
        train(stage, journal)
    assert max(record["step"] for record in journal.metrics()) == logged
    assert len(list(tmp_path.glob("checkpoints/*/*.pt"))) == (full_at - 1) // 2
    assert all(thread.name != "grafting-checkpoint" for thread in threading.enumerate())


def saved_then(error: BaseException, path: Path) -> None:
    with CheckpointWriter(Full(path), "s", 2) as writer:
        writer.save(1, {"step": 1})
        raise error


def test_no_later_error_hides_that_of_the_writer_but_ctrl_c_does(tmp_path: Path) -> None:
    for error in (DivergedError("diverged"), Interrupted(143, 1)):
        with pytest.raises(CheckpointError) as caught:
            saved_then(error, tmp_path)
        assert caught.value.__context__ is error
    with pytest.raises(KeyboardInterrupt):
        saved_then(KeyboardInterrupt(), tmp_path)


def test_a_second_signal_gives_up_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, inside, pressed = folder(tmp_path), threading.Event(), threading.Event()
    save = torch.save

    def slow(state: Any, file: Any) -> None:
        inside.set()
        assert pressed.wait(PATIENCE)
        save(state, file)

    def press_twice() -> None:
        with run.stoppable(), CheckpointWriter(run, "s", 2) as writer:
            writer.save(1, {"step": 1, "x": torch.ones(9)})
            assert inside.wait(PATIENCE)
            signal.raise_signal(signal.SIGTERM)
            assert run.stop_requested() == 143
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                pressed.set()

    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert list((tmp_path / "checkpoints" / "s").iterdir()) == []


class Killed(Slow):
    """Its process is killed inside of the write of the second checkpoint."""

    def save_checkpoint(self, stage: str, step: int, state: Any, keep: int) -> None:
        if step == 4:
            os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        super().save_checkpoint(stage, step, state, keep)


def train_and_be_killed(stage: str, path: Path) -> None:
    torch.set_num_threads(1)
    train(stage, Killed(path, 6))


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_killed_inside_a_write_while_training_is_further_a_stage_goes_on_to_the_same_bits(
    tmp_path: Path, stage: str
) -> None:
    assert status_of(train_and_be_killed, stage, tmp_path / "cut") == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints" / stage).iterdir())
    assert [name[:13] for name in left] == [".000000004.js", ".000000004.pt", "000000002.jso", "000000002.pt"]
    cut, whole = folder(tmp_path / "cut"), folder(tmp_path / "whole")
    assert max(record["step"] for record in cut.metrics()) >= 5  # it had gone on while the file was written
    with cut.writing(stage):
        found = train(stage, cut)
    wanted = train(stage, whole)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in wanted.state_dict().items())
    assert cut.metrics() == whole.metrics()
    assert not list((tmp_path / "cut" / "checkpoints" / stage).glob(".*"))

"""Runs survive: one writer a folder, what `graft status` says, checkpoints that are whole, the rest of the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from several import held

from grafting.console import Console
from grafting.data import ImageLabelDataset
from grafting.errors import CheckpointError, DivergedError, Interrupted, RunError
from grafting.formats import weights
from grafting.runs import FolderLock, RunFolder, run_status
from grafting.runs import lock as locks
from grafting.runs.metrics import MAX_LINES
from grafting.runs.status import StatusFile

RECIPE = {"name": "x", "model": "m", "data": "d", "plan": [], "distill": {"steps": 10}, "finetune": None,
          "evaluate": None}  # fmt: skip


def create(path: Path, **changes: Any) -> RunFolder:
    return RunFolder.create(path, {**RECIPE, **changes}, Console(quiet=True), resume=path.exists())


def owner(**changes: Any) -> str:
    return json.dumps({**vars(locks.Owner.this_process()), **changes})


# ---- one writer


def test_a_second_process_is_refused_and_a_dead_one_s_lock_taken_over(tmp_path: Path) -> None:
    with held(tmp_path) as other:
        with pytest.raises(RunError) as caught:
            create(tmp_path / ".")
        assert f"in use by process {other.pid} on {os.uname().nodename!r} (since 20" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        other.kill()
        other.join()
        assert (tmp_path / "run.lock").exists()
        run = create(tmp_path)
        found = locks.read_owner(tmp_path)
        assert found is not None
        assert found.is_this_process()
        with run.writing():
            pass
        assert not (tmp_path / "run.lock").exists()


def test_within_one_process_the_lock_is_shared_and_given_back_by_its_holder(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    second.acquire()
    second.release()
    assert (tmp_path / "run.lock").exists()
    first.release()
    assert not (tmp_path / "run.lock").exists()
    with FolderLock(tmp_path) as third:
        assert third.held
    lost = FolderLock(tmp_path)
    lost.acquire()
    del lost  # out of use: given back
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "age", "refused"),
    [
        (
            {"host": "elsewhere", "boot": "b"},
            10,
            True,
        ),  # another machine, ten seconds after its last sign of life
        ({"host": "elsewhere", "boot": "b"}, locks.STALE_SECONDS + 5, False),
        ({"boot": "b"}, 10, True),  # the same name, but not this start of this machine
        ({"boot": "b"}, locks.STALE_SECONDS + 5, False),
        ({"pid": 2**22 + 1}, 0, False),  # here, and no such process
        ({"pid": os.getppid(), "ticks": "1"}, 0, False),  # here, and another process has the number now
        ({"pid": -1}, 0, False),
        ({"host": 3}, 0, False),
    ],
    ids=str,
)
def test_whose_lock_is_honoured(tmp_path: Path, change: dict[str, Any], age: float, refused: bool) -> None:
    path = tmp_path / "run.lock"
    said = owner(**change)
    path.write_text(said)
    then = time.time() - age
    os.utime(path, (then, then))
    if refused:
        with pytest.raises(RunError, match=r"in use by process.*its lock ends 90 s after"):
            FolderLock(tmp_path).acquire()
        assert path.read_text() == said
    else:
        with FolderLock(tmp_path):
            assert locks.read_owner(tmp_path).is_this_process()  # type: ignore[union-attr]


def test_where_a_disk_has_no_locks_the_file_alone_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FolderLock, "_flock", staticmethod(lambda handle: None))
    (tmp_path / "run.lock").write_text(owner(pid=os.getppid(), ticks=locks._ticks(os.getppid())))
    with pytest.raises(RunError, match=f"process {os.getppid()} on"):
        FolderLock(tmp_path).acquire()
    (tmp_path / "run.lock").write_text("torn {")
    with FolderLock(tmp_path) as held:
        assert held.held


def test_the_lock_shows_that_its_holder_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    with FolderLock(tmp_path):
        path = tmp_path / "run.lock"
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 1.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1.0


def test_a_lock_is_no_way_out_of_the_folder(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.lock").symlink_to(victim)
    with pytest.raises(RunError, match=r"run\.lock"):
        FolderLock(folder).acquire()
    (folder / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        RunFolder(folder).log({"stage": "s", "step": 1})
    (folder / ".status.json.tmp").symlink_to(victim)
    (folder / "status.json").symlink_to(victim)
    StatusFile(folder).start()
    (folder / "recipe.yaml").symlink_to(victim)
    weights.write_bytes(folder / "recipe.yaml", b"new")  # takes the link's place
    assert (folder / "recipe.yaml").read_bytes() == b"new"
    assert not (folder / "recipe.yaml").is_symlink()
    assert victim.read_text() == "mine"


def test_the_holder_clears_what_a_killed_process_left_half_written(tmp_path: Path) -> None:
    run = create(tmp_path)
    left = ["graft/.graft.json.x.tmp", "checkpoints/distill/.000000001.pt.x.tmp", "samples/.student.npz.7.partial",
            ".run.json.x.tmp", "cache/0-input.npy"]  # fmt: skip
    kept = ["graft/graft.json", "samples/student.npz", "notes/.mine.tmp", ".mine"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    with run.writing():
        assert not any((tmp_path / name).exists() for name in left)
        assert all((tmp_path / name).exists() for name in kept)


def test_a_run_that_died_before_its_first_file_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(owner(pid=2**22 + 1))
    (tmp_path / ".recipe.yaml.abc.tmp").write_text("name")
    create(tmp_path)


# ---- status


def test_status_of_a_run_through_its_life(tmp_path: Path) -> None:
    run = create(tmp_path)
    found = run_status(tmp_path)
    assert (found["state"], found["stages_left"]) == ("running", ["graft", "distill", "sample"])
    assert found["process"]["pid"] == os.getpid()
    with run.writing():
        with run.writing("graft"):
            run.finish("graft", {})
        with run.writing("distill"):
            assert run.load_checkpoint("distill") is None
            run.log({"stage": "distill", "step": 4, "loss": {"a": 1.0, "b": 2.0}})
            run.log(
                {"stage": "distill", "step": 4, "event": "validation", "error": {"a": 0.5, "b": float("nan")}}
            )
            run._status._written = float("-inf")
            run.progress("distill", 4, 10, "loss 1.5")
            found = run_status(tmp_path)
            assert {k: found[k] for k in ("state", "stage", "step", "steps", "error")} == {
                "state": "running", "stage": "distill", "step": 4, "steps": 10, "error": None,
            }  # fmt: skip
            assert found["eta_seconds"] >= 0
            assert found["losses"] == {
                "distill": {"training": {"step": 4, "value": 1.5}, "held_out": {"step": 4, "value": None}}
            }
            run.save_checkpoint("distill", 4, {"step": 4}, 2)
    found = run_status(tmp_path)
    assert (found["state"], found["checkpoint"], found["process"]) == ("idle", 4, None)
    for stage in ("distill", "sample"):
        with run.writing(stage):
            run.finish(stage, {})
    found = run_status(tmp_path)
    assert (found["state"], found["stages_left"], found["stage"]) == ("finished", [], None)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (DivergedError("stage 1 diverged:\n lower lr"), "failed", "stage 1 diverged: lower lr"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
        (Interrupted(143, 7), "stopped", "stopped at step 7 on request; --resume goes on from there"),
        (KeyboardInterrupt(), "stopped", "interrupted"),
        (SystemExit(), "stopped", "terminated"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_status_of_a_run_that_ended_early(
    tmp_path: Path, error: BaseException, state: str, text: str
) -> None:
    run = create(tmp_path)
    with pytest.raises(type(error)), run.writing(), run.writing("distill"):
        raise error
    found = run_status(tmp_path)
    assert (found["state"], found["stage"], found["error"]) == (state, "distill", text)
    with create(tmp_path).writing("distill"):  # it goes on: the error is history
        assert run_status(tmp_path)["error"] is None


def test_status_of_a_run_whose_process_is_gone(tmp_path: Path) -> None:
    run = create(tmp_path)
    with run.writing("distill"):
        status = (tmp_path / "status.json").read_text()
    (tmp_path / "status.json").write_text(status)
    (tmp_path / "run.lock").write_text(owner(pid=2**22 + 1))
    assert run_status(tmp_path)["state"] == "dead"
    (tmp_path / "run.lock").unlink()
    (tmp_path / "status.json").write_text(status.replace('"done"', '"running"'))
    assert run_status(tmp_path)["state"] == "dead"


def test_status_of_folders_that_are_odd(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run\.json"):
        run_status(tmp_path)
    create(tmp_path)
    for text in ("", "[]", '{"state": 3, "step": "x", "stage": [], "error": {}}', '{"error": "\\u001b[2J"}'):
        (tmp_path / "status.json").write_text(text)
        found = run_status(tmp_path)
        assert found["error"] in (None, " [2J")
    (tmp_path / "recipe.yaml").write_text("- 1\n")
    with pytest.raises(RunError, match="recipe"):
        run_status(tmp_path)


# ---- checkpoints


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    scores = {2: 0.5, 4: 0.3, 6: 0.4, 8: float("nan"), 10: 0.6}
    for step in range(1, 12):
        state = {"step": step, "validation": {s: v for s, v in scores.items() if s <= step}}
        run.save_checkpoint("s", step, state, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints/s").iterdir())
    assert names == [f"{step:09d}.{kind}" for step in (4, 10, 11) for kind in ("json", "pt")]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_of_later_steps_take_no_whole_one_s_place(tmp_path: Path, keep: int) -> None:
    run = RunFolder(tmp_path)
    for step in (20, 30):
        run.save_checkpoint("s", step, {"step": step}, keep=2)
        (tmp_path / f"checkpoints/s/{step:09d}.pt").write_bytes(b"x")
    assert run.load_checkpoint("s") is None
    for step in (5, 10, 15):
        run.save_checkpoint("s", step, {"step": step}, keep)
        assert run.load_checkpoint("s")["step"] == step  # type: ignore[index]
    run.save_checkpoint("s", 30, {"step": 30}, keep)
    names = sorted(path.stem for path in (tmp_path / "checkpoints/s").glob("*.pt"))
    assert names == [f"{step:09d}" for step in (20, 30)[-keep:]]


def test_a_checkpoint_is_not_written_twice_unless_it_is_damaged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_checkpoint("s", 3, {"step": 3, "x": torch.ones(4), "seconds": 1.0}, keep=1)
    path = tmp_path / "checkpoints/s/000000003.pt"
    first = path.read_bytes()
    run.save_checkpoint("s", 3, {"step": 3, "x": torch.ones(4), "seconds": 2.0}, keep=1)
    assert path.read_bytes() == first
    path.write_bytes(first[:-1] + b"x")
    run.save_checkpoint("s", 3, {"step": 3, "x": torch.ones(4), "seconds": 2.0}, keep=1)
    assert run.load_checkpoint("s")["seconds"] == 2.0  # type: ignore[index]


@pytest.mark.parametrize(
    "manifest", ["", "{}", "[]", '{"size": 1}', '{"version": 9}', '{"size": "x", "sha256": null}']
)
def test_a_checkpoint_with_a_strange_manifest_is_passed_over(
    tmp_path: Path, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path, Console())
    for step in (3, 6):
        run.save_checkpoint("s", step, {"step": step}, keep=2)
    (tmp_path / "checkpoints/s/000000006.json").write_text(manifest)
    assert run.load_checkpoint("s")["step"] == 3  # type: ignore[index]
    warning = capsys.readouterr().err
    assert "000000006" in warning
    assert "using the checkpoint before it" in warning


def test_a_folder_that_has_vanished_is_named_and_not_made_again(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(RunError, match="is gone"):
        run.save_checkpoint("s", 1, {"step": 1}, 2)
    with pytest.raises(RunError, match=r"can't write.*metrics\.jsonl"):
        run.log({"stage": "s", "step": 1})
    assert not (tmp_path / "run").exists()


def test_a_failed_checkpoint_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.save_checkpoint("s", 1, {"step": 1}, keep=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints/s").iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grafting.formats.weights.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.save_checkpoint("s", 2, {"step": 2}, keep=1)
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints/s").iterdir()}
    assert before.items() <= after.items()
    assert run.load_checkpoint("s")["step"] == 1  # type: ignore[index]


# ---- metrics


def test_a_torn_line_is_taken_out_before_the_next_is_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log({"stage": "s", "step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "s", "st')
    assert run.load_checkpoint("other") is None
    run.log({"stage": "s", "step": 2})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"stage": "s", "step": 1}, {"stage": "s", "step": 2},
    ]  # fmt: skip


def test_a_very_long_run_is_thinned_by_a_rule_of_its_steps(tmp_path: Path) -> None:
    steps = 3 * MAX_LINES

    def log(run: RunFolder, first: int, last: int) -> None:
        for step in range(first + 1, last + 1):
            run.log({"stage": "distill", "step": step})
            if step % 5 == 0:
                run.log({"stage": "distill", "step": step, "event": "validation"})
            if step == 7:
                run.log({"stage": "distill", "step": step, "event": "rest"})

    whole = create(tmp_path / "whole", distill={"steps": steps})
    log(whole, 0, 3000)
    cut = create(tmp_path / "cut", distill={"steps": steps})
    log(cut, 0, 1500)
    again = RunFolder(tmp_path / "cut")
    again._metrics.drop("distill", after=1111)
    log(again, 1111, 3000)
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert a == b
    kinds = [record.get("event") for record in whole.metrics()]
    assert (kinds.count(None), kinds.count("validation"), kinds.count("rest")) == (1001, 600, 1)


# ---- gradients of stage 1


def test_stage_1_skips_gradients_that_are_not_finite_and_ends_after_too_many(
    data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grafting import GraftPlan, Replace, distill, graft

    teacher = tiny_dit()
    settings = {"steps": 6, "batch_size": 8, "num_validation": 8, "fit_samples": 8, "log_every": 1, "warmup": 0,
                "early_stop": 0, "keep_best": False, "precision": "fp32"}  # fmt: skip
    clip = torch.nn.utils.clip_grad_norm_
    calls: list[int] = []

    def overflowing(parameters: Any, limit: float) -> torch.Tensor:
        calls.append(1)
        norm = clip(parameters, limit)
        return norm * float("inf") if len(calls) in bad else norm

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", overflowing)
    bad: set[int] = {2, 5}
    student = graft(teacher, GraftPlan([Replace("mha", [1], "hyena_x")]))
    result = distill(student, teacher, data, settings)
    assert (result.steps, result.skipped_steps) == (6, 2)
    assert all(p.isfinite().all() for p in student.parameters())
    calls.clear()
    bad = {3, 4, 5}
    with pytest.raises(DivergedError, match="3 steps in a row"):
        distill(student, teacher, data, {**settings, "max_bad_steps": 2})


def test_a_dry_run_says_that_its_folder_is_taken(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").check_free()
    create(tmp_path / "old")
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder(tmp_path / "old").check_free()
    RunFolder(tmp_path / "old").check_free(resume=True)
    (tmp_path / "notes").write_text("")
    with pytest.raises(RunError, match="not an empty folder"):
        RunFolder(tmp_path).check_free()
    assert not (tmp_path / "new").exists()


# ---- the network


def test_importing_and_grafting_need_no_network() -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('no network here')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import grafting, grafting.cli\n"
        "model = grafting.load_model('dit-fashion')\n"
        "plan = grafting.GraftPlan([grafting.Replace('mha', [1], 'hyena_x')])\n"
        "assert grafting.graft(model, plan) is not model\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

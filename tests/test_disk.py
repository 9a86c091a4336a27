"""What a run leaves on disk when it is killed, and what it says when the disk does not do what it should."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import tiny_pipeline

from grafting.errors import CheckpointError, RunError
from grafting.evaluation import write_samples
from grafting.generation import save_grid
from grafting.rehearsal import _most_checkpoints
from grafting.runs import RunFolder, checkpoints
from grafting.training import cache as caches
from grafting.training.config import DistillConfig, FinetuneConfig, Optimization

CACHED = {"mode": "cached", "cache_samples": 12}


def test_stored_activations_of_a_killed_run_are_cleared_by_the_next_process(tmp_path: Path) -> None:
    untouched = tiny_pipeline(tmp_path, "untouched", distill=CACHED)
    untouched.distill()
    pipeline = tiny_pipeline(tmp_path, "cut", distill=CACHED)
    pipeline.run._lock.release()  # the fork is another process
    process = os.fork()
    if not process:
        try:
            fill = caches.ActivationCache._fill.__func__  # type: ignore[attr-defined]

            def fill_and_die(*arguments: Any) -> None:
                cache = fill(*arguments)
                assert cache.folder.is_dir()
                os.kill(os.getpid(), signal.SIGKILL)

            caches.ActivationCache._fill = classmethod(fill_and_die)  # type: ignore[assignment, method-assign]
            pipeline.distill()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    left = list((tmp_path / "cut" / "cache").iterdir())
    assert len(left) == 1
    assert len(list(left[0].iterdir())) == 3
    tiny_pipeline(tmp_path, "cut", resume=True, distill=CACHED).distill()
    weights = [
        {path.name for path in (tmp_path / name / "graft").glob("*.safetensors")}
        for name in ("untouched", "cut")
    ]  # the names hold hashes
    assert weights[0] == weights[1]
    for name in ("untouched", "cut"):
        assert not (tmp_path / name / "cache").exists()


def test_a_disk_too_full_for_stored_activations_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    pipeline = tiny_pipeline(tmp_path, distill=CACHED)
    with pytest.raises(
        RunError, match=r"can't store activations in .*No space left on device; free some disk"
    ):
        pipeline.distill()
    assert list((tmp_path / "run" / "cache").iterdir()) == []


def test_a_folder_taken_away_inside_a_checkpoint_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    save = torch.save

    def save_and_lose(state: Any, file: Any) -> None:
        save(state, file)
        shutil.rmtree(run.path)

    monkeypatch.setattr(torch, "save", save_and_lose)
    with pytest.raises(CheckpointError, match=r"can't write .*000000001\.pt': No such file or directory"):
        run.save_checkpoint("s", 1, {"step": 1}, keep=2)
    assert list(tmp_path.iterdir()) == []


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("room", [0, 1, 3000, 40_000, 390_000])
def test_a_checkpoint_that_finds_no_room_is_one_error_and_leaves_the_others(
    tmp_path: Path, room: int
) -> None:
    """A real refusal by the system, at the first byte, in the archive's head, in its tensors, in its last bytes."""
    run = RunFolder(tmp_path)
    state = {"step": 1, "x": torch.randn(100_000)}
    run.save_checkpoint("s", 1, state, keep=2)
    before = written(tmp_path / "checkpoints" / "s")
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        with pytest.raises(CheckpointError, match=r"^can't write .*/000000002\.pt': File too large$"):
            run.save_checkpoint("s", 2, {**state, "step": 2}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert written(tmp_path / "checkpoints" / "s") == before
    assert run.load_checkpoint("s")["step"] == 1  # type: ignore[index]


@pytest.mark.parametrize("room", [0, 50, 60_000, 100_100, 100_500])
def test_samples_that_find_no_room_are_one_error_and_leave_nothing(tmp_path: Path, room: int) -> None:
    """A real refusal: at the head, inside the images, at the labels, and at the archive's end."""
    images, old = np.zeros((10, 100, 100, 1), np.uint8), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"^can't write .*/a\.npz': File too large$"):
            write_samples(tmp_path / "a.npz", images, np.arange(10), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_that_finds_no_room_is_one_error(tmp_path: Path) -> None:
    noise, old = np.random.default_rng(0), resource.getrlimit(resource.RLIMIT_FSIZE)
    images = noise.integers(0, 256, (10, 100, 100, 1), dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"^can't write .*/a\.png': File too large$"):
            save_grid(images, tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EPERM, errno.EIO, errno.ESTALE])
def test_a_folder_that_takes_nothing_any_more_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Root may write anywhere, so the refusal is put where the system would put it."""
    run = RunFolder(tmp_path)
    run.save_checkpoint("s", 1, {"step": 1}, keep=2)
    before = written(tmp_path / "checkpoints" / "s")

    def refuse(*given: Any, **rest: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("grafting.formats.weights.tempfile.mkstemp", refuse)
    with pytest.raises(CheckpointError, match=f"can't write .*000000002.*: {os.strerror(number)}"):
        run.save_checkpoint("s", 2, {"step": 2}, keep=2)
    monkeypatch.undo()
    assert written(tmp_path / "checkpoints" / "s") == before
    monkeypatch.setattr("grafting.runs.metrics.os.open", refuse)
    with pytest.raises(RunError, match=rf"can't write .*metrics\.jsonl': {os.strerror(number)}"):
        run.log({"stage": "s", "step": 2})


def test_pairs_whose_process_was_killed_before_the_manifest_can_be_gone_on_with(tmp_path: Path) -> None:
    from grafting.data.prompts import Prompt
    from grafting.synthesis import Synthesis, _Job
    from grafting.training.compute import Compute

    out = tmp_path / "pairs"
    compute = Compute(torch.device("cpu"), "fp32")
    job = _Job(
        "m",
        tmp_path,
        [Prompt(1, "a cat")],
        "p",
        out,
        Synthesis(num=1),
        compute,
        None,
        lambda *given: None,
        None,
        None,
    )
    out.mkdir()
    (out / ".captions.jsonl.x.tmp").write_text("half")
    (out / "captions.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="not an empty folder"):
        job.begin(resume=False)
    (out / "mine.txt").write_text("notes")
    with pytest.raises(RunError, match="not an empty folder"):
        job.begin(resume=True)
    (out / "mine.txt").unlink()
    job.begin(resume=True)
    assert "a cat" in (out / "captions.jsonl").read_text()
    with pytest.raises(RunError, match="go on with --resume"):
        job.begin(resume=False)


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_the_estimate_counts_all_checkpoints_that_are_there_at_once(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst case: the first is the best, and the newest is written before the oldest goes."""
    config: Optimization = (DistillConfig if stage == "distill" else FinetuneConfig)(keep_checkpoints=2)
    run, rotate, there = RunFolder(tmp_path), checkpoints._rotate, []

    def seen(folder: Path, step: int, keep: int) -> None:
        there.append(len(list(folder.glob("*.pt"))))
        rotate(folder, step, keep)

    monkeypatch.setattr(checkpoints, "_rotate", seen)
    for step in range(1, 7):
        scores = {"validation": {step: float(step)}} if stage == "finetune" else {}
        run.save_checkpoint(stage, step, {"step": step, **scores}, config.keep_checkpoints)
    assert max(there) == _most_checkpoints(config)

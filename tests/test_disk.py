"""What a run leaves on disk when it is killed, and what it says when the disk does not do what it should."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_pipeline

from grafting.errors import RunError
from grafting.training import cache as caches

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

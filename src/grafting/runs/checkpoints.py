"""Checkpoints of a stage: `<step>.pt` with `<step>.json`, its manifest (size, hash, score).

The manifest comes first, then the checkpoint under its name: one that is there is whole and has a manifest.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grafting.errors import CheckpointError, GraftError
from grafting.formats import weights

VERSION = 1
_CHUNK = 1 << 22


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], keep: int, score: float | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Write the state after `step`, then remove all up to it but the newest `keep` and the one of lowest score.

    Later ones are damaged, since a stage goes on from the newest whole one: they take no whole one's place.
    given_up: asked while writing; True ends it. Raises CheckpointError; the earlier checkpoints are then as they were.
    """
    import torch

    path = _path(folder, step)
    if path.exists() and _is_whole(path):  # stopped where it has just been saved: the state is the same
        return
    path.unlink(missing_ok=True)
    with weights.new_file(path) as file:
        hashed: Any = _Hashed(file, given_up)
        try:
            torch.save(dict(state), hashed)
        except RuntimeError:  # PyTorch's archive, which can't end either, hides the error of the disk
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        if not folder.is_dir():  # taken away meanwhile: the manifest must not make it anew
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        weights.write_json(path.with_suffix(".json"), {
            "version": VERSION, "step": step, "size": hashed.size, "sha256": hashed.digest.hexdigest(), "score": score,
        })  # fmt: skip
    _rotate(folder, step, keep)


def load_checkpoint(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint, or None; each one that is not whole is named and passed over.

    Its tensors are pages of the file (`weights.read_pickled`): copy what is kept.
    """
    for path in sorted(folder.glob("*.pt"), reverse=True):
        try:
            _check(path)
            return _read(path)
        except GraftError as error:
            warn(f"warning: {error}; using the checkpoint before it")
    return None


def read_checkpoint(folder: Path, step: int) -> dict[str, Any] | None:
    """As `load_checkpoint`, that after `step`, which another process has found whole; None where it is not there."""
    path = _path(folder, step)
    return _read(path) if path.is_file() else None


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, by its name."""
    return max((int(path.stem) for path in folder.glob("*.pt") if path.stem.isdecimal()), default=None)


def _path(folder: Path, step: int) -> Path:
    return folder / f"{step:09d}.pt"


def _read(path: Path) -> dict[str, Any]:
    state = weights.read_pickled(path, mapped=True)
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"checkpoint {path} does not hold the state of a stage")
    return state


def _is_whole(path: Path) -> bool:
    try:
        _check(path)
    except GraftError:
        return False
    return True


def _check(path: Path) -> None:
    """Raise CheckpointError unless size and hash are those of the manifest."""
    expected = weights.read_json(path.with_suffix(".json"), "checkpoint manifest")
    if expected.get("version", VERSION) != VERSION:
        raise CheckpointError(f"checkpoint {path} was written by another version of this package")
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise CheckpointError(f"can't read checkpoint {path}: {error.strerror or error}") from None
    if (size, digest.hexdigest()) != (expected.get("size"), expected.get("sha256")):
        raise CheckpointError(f"checkpoint {path} is damaged: its hash is not the recorded one")


def _rotate(folder: Path, step: int, keep: int) -> None:
    paths = sorted(path for path in folder.glob("*.pt") if path.stem <= _path(folder, step).stem)
    scores = {path: score for path in paths if (score := _score(path)) is not None}
    best = min(scores, key=lambda path: (scores[path], path)) if scores else None
    for path in paths[: -max(1, keep)]:
        if path != best:
            path.unlink(missing_ok=True)
    for manifest in folder.glob("*.json"):
        if not manifest.with_suffix(".pt").exists():
            manifest.unlink(missing_ok=True)


def _score(path: Path) -> float | None:
    try:
        score = weights.read_json(path.with_suffix(".json"), "checkpoint manifest").get("score")
    except GraftError:
        return None
    return float(score) if isinstance(score, (int, float)) else None


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: Any, given_up: Callable[[], bool]) -> None:
        self.file, self.size, self.digest, self.given_up = file, 0, hashlib.sha256(), given_up
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.given_up():
            self.error = InterruptedError(errno.EINTR, "given up on request")
            raise self.error
        self.digest.update(data)
        self.size += len(data)
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

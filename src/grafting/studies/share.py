"""A study's folder among several processes: workers of `--jobs`, several commands, or the processes of one launch.

Rows are shared out by the folder's locks, so the processes of `srun`, `torchrun` or `accelerate launch` are no one job
here, as they are in `graft run`: each works for itself, on a device of its own, and none joins a group.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from grafting import processes
from grafting.errors import InUseError
from grafting.formats import weights
from grafting.runs import FolderLock
from grafting.runs.lock import NAME as LOCK
from grafting.runs.lock import is_alive, read_owner

_LAUNCHES = "launches"  # in a study's folder: a file for each process of a launch that worked there
# What the processes of one launch have in common, and hardly two launches: a process notes its own number besides.
_COMMON = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """This process among `world` that work on one study independently. key: what tells their launch from others."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    key: str = ""

    @classmethod
    def here(cls) -> Launch:
        """As the environment says. Raises GraftError where it contradicts itself."""
        where = processes.place()
        said = "\n".join([str(where.world), *(os.environ.get(name, "") for name in _COMMON)])
        key = hashlib.sha256(said.encode()).hexdigest()[:12]
        return cls(where.rank, where.world, where.local_rank, key)

    def may_begin(self, folder: Path) -> bool:
        """Whether nothing lies in `folder` but what other processes of this launch have just made."""
        if not folder.exists():
            return True
        if not folder.is_dir():
            return False
        if not {path.name for path in folder.iterdir()} - {_LAUNCHES}:
            return True
        begun = any((folder / _LAUNCHES).glob(f"{self.key}-*"))
        return self.world > 1 and begun and not self._note(folder).exists()  # its own is from a launch before

    def begin(self, folder: Path) -> None:
        """Say in `folder` that this launch works there, before anything else is made in it."""
        if self.world > 1:
            note = self._note(folder)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()

    def _note(self, folder: Path) -> Path:
        return folder / _LAUNCHES / f"{self.key}-{self.rank}"


def take(device: str) -> None:
    """Make a numbered GPU this process's current one: pinned memory, for one, has a context on that."""
    if re.fullmatch(r"cuda:\d+", device):
        with contextlib.suppress(RuntimeError, AssertionError):  # there is no such: every row will say so
            torch.cuda.set_device(device)


@contextlib.contextmanager
def alone_in(
    folder: Path, say: Callable[[str], None] | None = None, patience: float = math.inf
) -> Iterator[None]:
    """While inside, no other process works in `folder`: waited for, `patience` seconds at most, then InUseError.

    say: is told once that there is something to wait for. Raises RunError at once where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    until = time.monotonic() + patience
    while True:
        try:
            lock.acquire()
            break
        except InUseError as error:
            if time.monotonic() > until:
                raise
            if say is not None:
                say(f"waiting for another process: {error}")
                say = None
            time.sleep(0.5)
    try:
        yield
    finally:
        lock.release()


def is_at_work(folder: Path) -> bool:
    """Whether another living process holds the lock of a folder."""
    owner = read_owner(folder)
    return owner is not None and not owner.is_this_process() and is_alive(owner, folder / LOCK)


def link(source: Path, target: Path) -> None:
    """`target` is `source`: one file on disk where that can be, else a copy."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as given, weights.new_file(target) as file:
            shutil.copyfileobj(given, file)


__all__ = ["Launch", "alone_in", "is_at_work", "link", "take"]

"""One folder, one writer: an advisory lock (flock) on a file that says who holds it.

flock alone is not enough: some shared disks keep it on each machine for itself, and some have none. So the file
also names process, host and boot, and its time of change is renewed while the holder lives. A holder on this machine
is alive if its process is; one on another machine if its last sign of life is younger than `STALE_SECONDS`, by the
clock of the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import weakref
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from grafting.errors import InUseError, RunError

try:
    import fcntl
except ImportError:  # Windows: process, host and time of change must do
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
_HELD = (errno.EACCES, errno.EAGAIN)
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. `ticks` tells it from a later process of the same number."""

    pid: int
    host: str
    boot: str
    ticks: str
    since: str  # UTC

    @classmethod
    def this_process(cls) -> Owner:
        """This process, from now."""
        return cls(os.getpid(), socket.gethostname(), _boot(), _ticks(os.getpid()), utc_now())

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner that a lock file names, or None if it names none."""
        try:
            found: Any = json.loads(text)
            owner = cls(**{key: found[key] for key in ("pid", "host", "boot", "ticks", "since")})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        texts = (owner.host, owner.boot, owner.ticks, owner.since)
        valid = type(owner.pid) is int and owner.pid > 0 and all(isinstance(text, str) for text in texts)
        return owner if valid else None

    def is_this_process(self) -> bool:
        """Whether it is this very process."""
        return (self.pid, self.host, self.boot, self.ticks) == (
            os.getpid(), socket.gethostname(), _boot(), _ticks(os.getpid()),
        )  # fmt: skip

    def is_here(self) -> bool:
        """Whether it is, or was, on this machine since it was started."""
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def is_running(self) -> bool:
        """Whether its process exists; asked of an owner on this machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # it exists and is not ours
            pass
        ticks = _ticks(self.pid)
        return not (ticks and self.ticks) or ticks == self.ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host[:80]!r} (since {self.since[:40]} UTC)"


class FolderLock:
    """The right to write to a folder. Within one process it is shared; another process gets InUseError.

    Released by `release`, when it goes out of use, and by the end of the process, however that comes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._free: weakref.finalize[Any, FolderLock] | None = None
        self.shared = False  # another lock of this process holds it

    @property
    def held(self) -> bool:
        """Whether this process may write."""
        return self.shared or (self._free is not None and self._free.alive)

    def acquire(self) -> None:
        """Take the lock. Raises InUseError, naming the holder, if a living process has it; RunError for the disk."""
        if self.held:
            return
        for _ in range(100):
            handle = self._open()
            try:
                locked = self._flock(handle)
                if not self._is_current(handle):  # its holder removed the file as it ended
                    os.close(handle)
                    continue
                owner = Owner.parse(os.pread(handle, _MAX_BYTES, 0).decode("utf-8", "replace"))
                if owner is not None and owner.is_this_process():
                    self.shared = True
                    os.close(handle)
                    return
                same_kernel = owner is not None and owner.boot == _boot() != ""  # there flock alone is enough
                if locked is False or (
                    owner is not None and not (locked and same_kernel) and is_alive(owner, self.path)
                ):
                    raise InUseError(self._refusal(owner))
                self._write(handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(handle)
                raise
            beating = threading.Event()
            self._free = weakref.finalize(self, _release, handle, self.path, beating)
            threading.Thread(target=_beat, args=(handle, beating), name="grafting-lock", daemon=True).start()
            return
        raise InUseError(f"can't lock {str(self.path)!r}: the file comes and goes; is another run starting?")

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._free is not None:
            self._free()
        self._free, self.shared = None, False

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(self.path, flags, 0o644)
        except OSError as error:
            raise RunError(f"can't write {str(self.path)!r}: {error.strerror or error}") from None

    @staticmethod
    def _flock(handle: int) -> bool | None:
        """True: got it; False: another process has it; None: this disk has no such locks."""
        if fcntl is None:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in _HELD else None
        return True

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False

    def _write(self, handle: int) -> None:
        content = (json.dumps(asdict(Owner.this_process())) + "\n").encode()
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, content, 0)
            os.fsync(handle)
        except OSError as error:
            raise RunError(f"can't write {str(self.path)!r}: {error.strerror or error}") from None

    def _refusal(self, owner: Owner | None) -> str:
        folder = str(self.path.parent)
        if owner is None:
            return f"{folder!r} is in use by another process that has just begun; give another --out"
        advice = "wait for it, stop it, or give another --out"
        if not owner.is_here():
            advice += f"; if it died without a word, its lock ends {STALE_SECONDS:.0f} s after its last sign of life"
        return f"{folder!r} is in use by {owner}: {advice}"


def read_owner(folder: Path) -> Owner | None:
    """Who holds the lock of a folder, or held it last; None if nobody does."""
    try:
        with (folder / NAME).open("rb") as file:
            return Owner.parse(file.read(_MAX_BYTES).decode("utf-8", "replace"))
    except OSError:
        return None


def is_alive(owner: Owner, path: Path) -> bool:
    """Whether the owner named in lock file `path` still lives, as far as can be known from here."""
    return owner.is_running() if owner.is_here() else _age(path) < STALE_SECONDS


def utc_now() -> str:
    """The time as 2026-11-23T08:30:00, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _age(path: Path) -> float:
    """Seconds since `path` changed, by the clock of its disk where a file can be made there, else by ours."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        changed = path.stat().st_mtime
    except OSError:
        return float("inf")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
        now = probe.stat().st_mtime
    except OSError:
        now = time.time()
    finally:
        probe.unlink(missing_ok=True)
    return now - changed


def _beat(handle: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _release(handle: int, path: Path, beating: threading.Event) -> None:
    beating.set()
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False)):
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.close(handle)


def _boot() -> str:
    """What changes when the machine starts anew; empty where it can't be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _ticks(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where that can't be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""

"""A lock that several processes of one study take on a row: held by the kernel, so that a dead process holds none."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafting.errors import RunError


class FileLock:
    """An exclusive lock on `path`, whose content says who took it last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; without `wait`, False where another process (or another lock here) holds it."""
        try:
            import fcntl
        except (
            ImportError
        ):  # no such locks on this system: whoever starts two processes there is on their own
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"can't write {self.path}: {error.strerror}; give another --out") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError as error:
            os.close(handle)
            raise RunError(
                f"can't lock {self.path}: {error.strerror}; give an --out that can be locked"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
        self._handle = handle
        return True

    def release(self) -> None:
        """Give the lock back; the file stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def owner(self) -> dict[str, Any]:
        """Who took the lock last: {"pid", "host"}, or nothing."""
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock and hold it."""
        self.acquire(wait=True)
        try:
            yield
        finally:
            self.release()

"""Finished batches of a sample file that is being drawn: the folder `.NAME.parts` beside it.

Each batch is drawn whole by one process, which writes it under its number: a stop or a kill loses the batches that were
under way, and the next attempt draws those alone. Processes meet at the start only; from then on they look at the disk,
for a message between them is waited for ten minutes, and a batch may take longer.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grafting import processes
from grafting.errors import CheckpointError, GraftError, RunError
from grafting.formats import weights
from grafting.runs.lock import FolderLock
from grafting.training.compute import Compute

MANIFEST = "parts.json"  # what the batches are batches of; gone when the file is whole
SECONDS = 2.0  # between two looks at the disk, at most
_VISIBLE_SECONDS = 90.0  # that another machine may take to see a new folder


class Parts:
    """The batches of the file `target` of `num` samples, as one of several processes sees them.

    `size` is the number of samples of a batch, `count` of batches; known once `opened` is entered.
    """

    def __init__(self, target: Path, num: int, compute: Compute, tell: Callable[[int], None]) -> None:
        """tell: gets the number of finished batches whenever it has changed."""
        self.target, self.folder = target, parts_of(target)
        self.num, self.compute, self.tell = num, compute, tell
        self.size = self.count = 0
        self._told = 0
        self._missing: list[int] = []  # at the start
        self._manifest = b""

    @contextlib.contextmanager
    def opened(self, identity: Callable[[], Mapping[str, Any]], choose: Callable[[], int]) -> Iterator[None]:
        """While inside, this command alone draws `target`. The folder is gone after a good end, and kept after another.

        identity: all that the samples depend on; finished batches of anything else are discarded. choose: the size of
        a batch, for a new beginning. The first process calls both. Raises GraftError, RunError where another command
        draws the same file.
        """
        if not self.compute.is_main:
            self._join(None)
            yield
            return
        try:
            with self._lock():
                try:
                    self._join(self._begin(dict(identity()), choose))
                    yield
                except BaseException:
                    if not self._numbers():  # nothing to go on with
                        _clear(self.folder)
                    raise
                _clear(self.folder)
        finally:
            with contextlib.suppress(OSError):  # where it still holds something, it stays
                self.folder.rmdir()

    def draw(self, draw: Callable[[range], np.ndarray]) -> None:
        """Draw this process's share of what is missing; `draw` gets sample numbers.

        Raises PeerError once another process has ended.
        """
        self.done()
        for number in self.compute.mine(self._missing):
            processes.check_others()
            self._write(number, draw(self.rows(number)))
            self.done()

    def rows(self, number: int) -> range:
        """The numbers of the samples of a batch."""
        return range(number * self.size, min(self.num, (number + 1) * self.size))

    def done(self) -> int:
        """How many batches are finished, by any process; the first one tells."""
        done = len(self._numbers())
        if done != self._told and self.compute.is_main:
            self._told = done
            self.tell(done)
        return done

    def await_all(self) -> None:
        """The first process waits for the batches of the others. Raises PeerError once one of them has ended."""
        for _ in _looks():
            if self.done() >= self.count:
                return

    def await_end(self) -> None:
        """The others wait until the first one has made the file. Raises PeerError once it has ended without."""
        for _ in _looks():
            if not (self.folder / MANIFEST).exists():
                return

    def images(self) -> Iterator[np.ndarray]:
        """All batches in order, uint8 [B, H, W, C]. Raises RunError for one that can't be read."""
        for number in range(self.count):
            found = _read(self.folder / _name(number), len(self.rows(number)))
            if found is None:
                raise RunError(
                    f"the finished batch {str(self.folder / _name(number))!r} is gone or damaged; sample again: "
                    "it alone is drawn"
                )
            yield np.array(found)

    # ---- the folder

    def _lock(self) -> FolderLock:
        if self.folder.is_symlink():  # what is written there would go elsewhere
            self.folder.unlink()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GraftError(
                f"can't write {str(self.target)!r}: {error.strerror}; give another place"
            ) from None
        return FolderLock(self.folder)

    def _begin(self, identity: dict[str, Any], choose: Callable[[], int]) -> tuple[int, list[int], bytes]:
        """Size of a batch, numbers of those to draw, and the content of the manifest, which is written."""
        weights.clear_partial(self.folder)
        known, identity = self._known(), json.loads(json.dumps(identity))
        if known is not None and known["of"] == identity:
            size = known["batch_size"]
        else:
            _clear(self.folder)
            size = min(self.num, choose())
            weights.write_json(self.folder / MANIFEST, {"batch_size": size, "of": identity})
        self.size = size
        missing = [
            number
            for number in range(-(-self.num // size))
            if _read(self.folder / _name(number), len(self.rows(number))) is None
        ]
        for number in missing:  # damaged
            (self.folder / _name(number)).unlink(missing_ok=True)
        return size, missing, (self.folder / MANIFEST).read_bytes()

    def _known(self) -> dict[str, Any] | None:
        """The manifest that is there, if it is one."""
        try:
            found = weights.read_json(self.folder / MANIFEST, "batches")
        except CheckpointError:
            return None
        size = found.get("batch_size")
        return found if isinstance(size, int) and 0 < size <= self.num and "of" in found else None

    def _join(self, start: tuple[int, list[int], bytes] | None) -> None:
        self.size, self._missing, self._manifest = self.compute.from_main(start)
        self.count = -(-self.num // self.size)
        self._await_folder()

    def _await_folder(self) -> None:
        """Until this process sees what the first one made: over a network that may take a while."""
        until = time.monotonic() + _VISIBLE_SECONDS
        for _ in _looks():
            if self._is_ours():
                return
            if time.monotonic() > until:
                raise RunError(
                    f"process {self.compute.rank} of {self.compute.world} does not see the folder {str(self.folder)!r} "
                    "that the first one made; let the samples go to a disk that all machines share"
                )

    def _is_ours(self) -> bool:
        try:
            return (self.folder / MANIFEST).read_bytes() == self._manifest
        except OSError:
            return False

    def _write(self, number: int, images: np.ndarray) -> None:
        if not self._is_ours():
            raise RunError(
                f"the folder of finished batches {str(self.folder)!r} was removed or taken over while samples were "
                "drawn; sample again"
            )
        with weights.new_file(self.folder / _name(number)) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(images), allow_pickle=False)

    def _numbers(self) -> list[int]:
        try:
            names = [path.name for path in self.folder.glob("*.npy")]
        except OSError:
            return []
        return [int(stem) for stem in (name.removesuffix(".npy") for name in names) if stem.isdecimal()]


def parts_of(target: Path) -> Path:
    """Where the finished batches of a sample file lie while it is drawn."""
    return target.with_name(f".{target.stem}.parts")


def remove_parts(target: Path) -> None:
    """Remove finished batches that lie beside a sample file, if there are any."""
    folder = parts_of(target)
    if folder.is_dir() and not folder.is_symlink():
        _clear(folder)
        with contextlib.suppress(OSError):  # where it holds something else, it stays
            folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove all batches, and last what says what they are; the folder stays."""
    for path in (*folder.glob("*.npy"), folder / MANIFEST):
        path.unlink(missing_ok=True)
    weights.clear_partial(folder)


def _name(number: int) -> str:
    return f"{number:06d}.npy"


def _read(path: Path, rows: int) -> np.ndarray | None:
    """The images of a finished batch, mapped into memory; None where there is no such batch, or not a whole one."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # whatever a damaged file leads to: it is drawn again
        return None
    return found if found.dtype == np.uint8 and found.ndim == 4 and len(found) == rows else None


def _looks() -> Iterator[None]:
    """Now and then, ever longer apart up to `SECONDS`. Raises PeerError once another process has ended."""
    pause = 0.02
    while True:
        yield
        processes.check_others()
        time.sleep(pause)
        pause = min(SECONDS, 1.5 * pause)

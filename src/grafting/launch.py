"""`--processes N`: the same command N times on this machine, watched, ending with one exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from grafting.cores import usable_cores
from grafting.errors import PeerError, RunError
from grafting.processes import LAUNCHER, place

GRACE = 10.0  # seconds that the others have to end by themselves once one has failed
_KILL = 5.0  # seconds from SIGTERM to SIGKILL
_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def wanted(processes: int) -> bool:
    """Whether this command has to be launched `processes` times. Raises RunError if it was already, otherwise."""
    world = place().world
    if world > 1 and processes not in (1, world):
        raise RunError(
            f"--processes {processes}, but this process was started as one of {world}; leave --processes out"
        )
    return processes > 1 and world == 1


def launch(arguments: Sequence[str], processes: int, command: Sequence[str] = ("-m", "grafting")) -> int:
    """Run `python -m grafting ARGUMENTS` in `processes` processes; its exit status.

    0 if all end well; otherwise that of the first to fail, and 137 if one was killed. The others get `GRACE` seconds.
    Signals are passed on once.
    """
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with _passing_on(workers, processes) as (seen, deliver):  # a signal may come at once
            port = _free_port()
            for rank in range(processes):
                workers.append(subprocess.Popen(
                    [sys.executable, *command, *arguments], env=_environment(rank, processes, port),
                    stdin=subprocess.DEVNULL, stdout=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,  # so that a Ctrl-C reaches them once, through us
                ))  # fmt: skip
                deliver()  # what came before it was in the list
            return _watch(workers, seen)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _environment(rank: int, processes: int, port: int) -> Mapping[str, str]:
    cores = usable_cores()
    given = os.environ.get("OMP_NUM_THREADS", str(cores))
    threads = str(max(1, cores // processes)) if given == str(cores) else given  # all of them are shared out
    return {
        **os.environ, "OMP_NUM_THREADS": threads, "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), LAUNCHER: str(os.getpid()),
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _passing_on(
    workers: Sequence[subprocess.Popen[bytes]], processes: int
) -> Iterator[tuple[list[signal.Signals], Callable[[], None]]]:
    """While inside, SIGINT and SIGTERM go to every worker once, also to those that are still to be started.

    Yields the signals seen, and what hands those that are waiting to the workers that have come.
    """
    seen: list[signal.Signals] = []
    waiting: list[deque[int]] = [deque() for _ in range(processes)]

    def deliver() -> None:
        for worker, numbers in zip(workers, waiting, strict=False):
            with contextlib.suppress(IndexError):
                while worker.poll() is None:
                    worker.send_signal(numbers.popleft())  # taken by one of us, should a signal come just now

    def pass_on(number: int, frame: FrameType | None) -> None:
        seen.append(signal.Signals(number))
        for numbers in waiting:
            numbers.append(number)
        deliver()

    previous = {number: signal.signal(number, pass_on) for number in _STATUS}
    try:
        yield seen, deliver
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[subprocess.Popen[bytes]], seen: Sequence[signal.Signals]) -> int:
    """Wait for all; end the rest some time after the first failure."""
    ended: dict[int, int] = {}  # number -> status, of those that ended by themselves
    failed_at: float | None = None
    while len(ended) < len(workers):
        for rank, worker in enumerate(workers):
            if rank not in ended and (code := worker.poll()) is not None:
                ended[rank] = code
                if code and failed_at is None:
                    failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + GRACE:
            _end([worker for rank, worker in enumerate(workers) if rank not in ended])
            break
        time.sleep(0.05)
    return _status(ended, len(workers), seen)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + _KILL
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.1, until - time.monotonic()))
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _status(ended: Mapping[int, int], processes: int, seen: Sequence[signal.Signals]) -> int:
    """One exit status of many; prints the error line of a process that could not do so itself."""
    killed = {rank: signal.Signals(-code) for rank, code in ended.items() if code < 0}
    if killed and seen:
        print(f"error: {'interrupted' if seen[0] == signal.SIGINT else 'terminated'}", file=sys.stderr)
        return _STATUS[seen[0]]
    if killed:
        rank, number = next(iter(killed.items()))
        cause = " (out of memory, perhaps)" if number == signal.SIGKILL else ""
        print(
            f"error: process {rank} of {processes} was ended by {number.name}{cause}; --resume goes on from the "
            "last checkpoint", file=sys.stderr,
        )  # fmt: skip
        return PeerError.exit_code
    failed = [code for code in ended.values() if code]
    if failed and all(code == PeerError.exit_code for code in failed):
        print("error: the processes of this run lost each other; --resume goes on from the last checkpoint",
              file=sys.stderr)  # fmt: skip
    return next((code for code in failed if code != PeerError.exit_code), failed[0] if failed else 0)

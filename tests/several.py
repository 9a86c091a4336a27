"""Functions in processes of their own: several that meet on the CPU, one that is killed, one that holds a lock."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from grafting import processes
from grafting.runs import FolderLock

PRELOADED = [  # once in a server, rather than in each process: a run's own work is less
    "grafting.pipeline", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor",
    "diffusers.schedulers.scheduling_ddim", "matplotlib.figure", "matplotlib.backends.backend_svg",
]  # fmt: skip


def together(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """What `work(*arguments)` returns in each of `world` processes; the traceback, as text, of one that fails."""
    context = _context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers, ends = [], []
    for rank in range(world):
        mine, theirs = context.Pipe()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        workers.append(context.Process(target=_worker, args=(theirs, place, work, arguments), daemon=True))
        workers[-1].start()
        theirs.close()
        ends.append(mine)
    found = []
    try:
        for end in ends:
            assert end.poll(timeout), "a process hangs"
            try:
                found.append(end.recv())
            except EOFError:
                found.append("died")
    finally:
        for worker in workers:
            worker.join(5)
            worker.kill()
    return found


def status_of(work: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> int | None:
    """Exit status of a process of its own that calls `work(*arguments)`: less than 0 for the signal that killed it."""
    worker = _context().Process(target=work, args=arguments, daemon=True)
    worker.start()
    worker.join(timeout)
    worker.kill()
    return worker.exitcode


@contextlib.contextmanager
def held(folder: Path) -> Iterator[ForkServerProcess]:
    """Another process that has the lock of `folder`, until it is killed or this is left."""
    context = _context()
    mine, theirs = context.Pipe()
    other = context.Process(target=_hold, args=(theirs, folder), daemon=True)
    other.start()
    theirs.close()
    try:
        assert mine.poll(120)
        assert mine.recv() == "held"
        yield other
    finally:
        mine.close()  # which ends it, and its lock with it
        other.join(60)
        assert not other.is_alive()


def _context() -> ForkServerContext:
    """Each of its processes is a fork of one that has imported PyTorch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _hold(end: Connection, folder: Path) -> None:
    with FolderLock(folder):
        end.send("held")
        with contextlib.suppress(EOFError):
            end.recv()


def _worker(
    end: Connection, place: dict[str, int], work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    try:
        result = work(*arguments)
    except BaseException:
        result = traceback.format_exc()
    end.send(result)
    processes.leave()

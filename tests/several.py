"""Run a function in several processes that meet each other on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from grafting import processes

PRELOADED = [
    "grafting.pipeline",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "diffusers.schedulers",
]


def together(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """What `work(*arguments)` returns in each of `world` processes; the traceback, as text, of one that fails."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # each is a fork of one that has imported torch already
    context.set_forkserver_preload(PRELOADED)
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

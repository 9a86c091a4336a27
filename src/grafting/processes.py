"""This process among several: which one it is, meeting the others, and ending together with one error line.

`graft run --processes N`, `accelerate launch`, `torchrun` and `srun` all start the same command several times; each
process reads its number from the environment.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from grafting.errors import GraftError, PeerError

if TYPE_CHECKING:
    import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # of a message that never comes; a process that died is noticed at once
LAUNCHER = "GRAFTING_LAUNCHER"  # process id of the launcher of --processes
# What says that there are several processes, to this package or to accelerate.
_SEVERAL = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
_ENDED = "another process of this run has ended; what is finished is kept: start again to go on (--resume)"
_PATIENCE = 3.0  # seconds to learn why another process went away
_FAREWELL = 5.0  # seconds that the first process waits for the others, for it keeps the shared notes


@dataclass(frozen=True)
class Place:
    """Number of this process, of all processes, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def place(environment: Mapping[str, str] | None = None) -> Place:
    """Where this process stands. Raises GraftError where the environment contradicts itself."""
    found = _addresses(os.environ if environment is None else environment)
    try:
        where = Place(*(int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except ValueError:
        raise GraftError("RANK, WORLD_SIZE and LOCAL_RANK in the environment are not whole numbers") from None
    if not 0 <= where.rank < where.world or where.local_rank < 0:
        raise GraftError(
            f"the environment says RANK={where.rank} of WORLD_SIZE={where.world}, LOCAL_RANK={where.local_rank}: "
            "numbers begin at 0 and stay below WORLD_SIZE"
        )
    return where


def own_device(device: str, number: int) -> str:
    """The device of worker `number` of this machine: plain `cuda` becomes one GPU of those that it sees."""
    if device != "cuda":
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count > 1 else device


@contextlib.contextmanager
def alone() -> Iterator[Place]:
    """While inside, nothing in the environment says that there are other processes, to this one and to what it starts.

    For work that this process does for itself whatever others do. Yields where it stands among them.
    """
    where = place()
    hidden = {name: os.environ.pop(name) for name in _SEVERAL if name in os.environ}
    try:
        yield where
    finally:
        os.environ.update(hidden)


def is_one_of_several() -> bool:
    """Whether this process was started as one of several."""
    return place().world > 1


def first_host(nodes: str) -> str:
    """The first machine of a Slurm node list, such as `gpu[03-05,9],cpu1`."""
    found = re.match(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\])?([^,]*)", nodes)
    return f"{found[1]}{found[2] or ''}{found[3]}" if found else nodes


def _addresses(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, from Slurm's names where only those are set.

    SLURM_STEP_NUM_TASKS, not SLURM_NTASKS: a batch script has the latter without being one of several.
    """
    if "WORLD_SIZE" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1") or 1) > 1:
        job, step = (int(env.get(name, "0") or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        return {
            "RANK": env.get("SLURM_PROCID", "0"), "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "localhost")),
            "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + (job * 16 + step) % 20000),
        }  # fmt: skip
    return {
        "RANK": env.get("RANK", "0"), "WORLD_SIZE": env.get("WORLD_SIZE", "1"),
        "LOCAL_RANK": env.get("LOCAL_RANK", env.get("RANK", "0")), "MASTER_ADDR": env.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": env.get("MASTER_PORT", "29500"),
    }  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """What all processes share: a group for messages between processors, and notes (None in a foreign group)."""

    control: Any
    notes: dist.Store | None
    meetings: Iterator[int] = field(default_factory=itertools.count)


def join() -> Place:
    """Meet the other processes, once; a no-op for one. Raises GraftError if they can't be reached."""
    where = place()
    if where.world > 1:
        _group()
    return where


def control() -> Any:
    """The group for messages that stay on the CPU, so that no GPU has to wait."""
    return _group().control


@functools.cache
def _group() -> _Group:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():  # by a program that uses this package
        return _Group(dist.new_group(backend="gloo", timeout=TIMEOUT), None)
    os.environ.update(_addresses(os.environ))
    backend = "gloo"
    # A build for an accelerator names it on machines that have none, too.
    available = torch.accelerator.is_available()
    if available and (accelerator := torch.accelerator.current_accelerator()) is not None:
        with contextlib.suppress(ValueError):  # one without a backend
            backend = f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator)}"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        notes = dist.PrefixStore("grafting", store)
        notes.set(f"who/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
        group = _Group(dist.new_group(backend="gloo", timeout=TIMEOUT), notes)
    except (RuntimeError, ValueError, OSError) as error:
        raise GraftError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} can't meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}; "
            "check MASTER_ADDR, MASTER_PORT and that all were started"
        ) from None
    return group


def orphaned() -> bool:
    """Whether the launcher of --processes is gone: nobody would pass on a signal any more."""
    launcher = os.environ.get(LAUNCHER)
    return launcher is not None and os.getppid() != int(launcher)


def meet(meanwhile: Callable[[], None] | None = None) -> None:
    """Wait for all processes, however long the slowest works; at once where they are another program's.

    A message between processes gives up after `TIMEOUT`, since it can't tell one that works from one that hangs; notes
    can be read for ever. `meanwhile` is called between looks. Raises PeerError as soon as a process failed or is gone.
    """
    joined = _notes()
    if joined is None:
        return
    notes, where = joined
    number, pause = next(_group().meetings), 0.01
    names = [f"met/{number}/{rank}" for rank in range(where.world)]
    try:
        notes.set(names[where.rank], "1")
        while not notes.check(names):
            check_others()
            if any(notes.check([f"left/{r}"]) and not notes.check([names[r]]) for r in range(where.world)):
                raise PeerError(_ENDED)
            if meanwhile is not None:
                meanwhile()
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
    except RuntimeError:  # whoever kept the notes is gone
        raise PeerError(_ENDED) from None


def check_others() -> None:
    """Raise PeerError if another process has failed or died: for one that waits for no message. Answers at once."""
    joined = _notes()
    if joined is None:
        return
    try:
        lost = orphaned() or _why(*joined, patience=0) is not None
    except (RuntimeError, ValueError):  # whoever kept the notes is gone
        lost = True
    if lost:
        raise PeerError(_ENDED)


def settle(code: int, message: str, *, lost: bool = False) -> tuple[int, bool]:
    """How this process ends: its exit status, and whether it is the one that prints the error line.

    The first process to fail prints; the others end with its status. `lost`: this one failed because another went away.
    """
    joined = _notes()
    if joined is None:
        return code, True
    notes, where = joined
    try:
        if lost:
            reason = _why(notes, where)
            result = (reason["code"], False) if reason else (code, LAUNCHER not in os.environ)
        else:
            mine = json.dumps({"rank": where.rank, "code": code, "message": message})
            first = json.loads(notes.compare_set("error", "", mine))
            result = (first["code"], first["rank"] == where.rank)
    except (RuntimeError, ValueError):  # whoever kept the notes is gone
        result = (code, not (lost and LAUNCHER in os.environ))
    _take_leave(notes, where)
    return result


def is_lost(error: BaseException) -> bool:
    """Whether an unexpected error comes from another process that failed or died."""
    joined = _notes()
    if joined is None or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    try:
        return _why(*joined) is not None
    except (RuntimeError, ValueError):
        return True


def leave() -> None:
    """End well: let the others read the shared notes, then close the group."""
    joined = _notes()
    if joined is None:
        return
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):
        joined[0].set(f"left/{joined[1].rank}", "1")
    if dist.is_initialized():
        dist.destroy_process_group()


def _notes() -> tuple[Any, Place] | None:
    if "torch" not in sys.modules or not _group.cache_info().currsize:
        return None
    notes = _group().notes
    return (notes, place()) if notes is not None else None


def _why(notes: Any, where: Place, patience: float = _PATIENCE) -> dict[str, Any] | None:
    """The first error that a process noted, or a process of this machine that is gone; waits a little for it."""
    until = time.monotonic() + patience
    while True:
        if notes.check(["error"]):
            found: dict[str, Any] = json.loads(notes.get("error"))
            return found
        for rank in range(where.world):
            host, pid = json.loads(notes.get(f"who/{rank}"))
            if host == socket.gethostname() and not _is_alive(pid) and not notes.check([f"left/{rank}"]):
                return {"rank": rank, "code": PeerError.exit_code, "message": "killed"}
        if time.monotonic() > until:
            return None
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _take_leave(notes: Any, where: Place) -> None:
    with contextlib.suppress(RuntimeError):
        notes.set(f"left/{where.rank}", "1")
        until = time.monotonic() + _FAREWELL
        others = [rank for rank in range(where.world) if rank != where.rank]
        while where.rank == 0 and others and time.monotonic() < until:
            others = [rank for rank in others if not notes.check([f"left/{rank}"])]
            time.sleep(0.02)

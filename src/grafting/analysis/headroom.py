"""How much memory is free for this process, and how many samples are drawn at once in it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from grafting.analysis.estimate import meta_copy, sample_memory

SHARE = 0.8  # of what is free: kernels' own scratch, fragments and other programs need some
MOST = {"cuda": 256}  # samples at once; beyond that a device gains nothing
MOST_ELSEWHERE = 20  # beyond a dozen a CPU gains nothing, and memory that is mapped anew costs a quarter more
UNCOUNTED = 16  # where memory or need can't be told and running out of it is no error that can be caught


_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def total_bytes(device: torch.device, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes of memory of the device, or None where it can't be told.

    For a CPU: of the machine, or the tightest limit of the control groups that a container or a job runs in.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [limit for limit, _ in _groups(proc / "self" / "cgroup", cgroups)]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def free_bytes(device: torch.device, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that this process can still take on `device`, or None where that can't be told.

    On CUDA: what the device has free and what PyTorch holds unused. On a CPU: what the system calls available, or what
    the tightest limit of its control groups (both versions) leaves; file caches that can be dropped are free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    left = (limit - used for limit, used in _groups(proc / "self" / "cgroup", cgroups))
    found = [*_available(proc / "meminfo"), *left]
    return max(0, min(found)) if found else None


def fitting_batch_size(
    model: nn.Module, num: int, device: torch.device, *, guidance: float, precision: str, processes: int = 1,
    held: int = 0,
) -> int:  # fmt: skip
    """How many of `num` samples to draw at once on `device`, in equal batches, as many as there are processes or more.

    From the counted need of a sample and what is free less `held` bytes. What can't be counted gives the most there is
    on CUDA, where drawing halves a batch that does not fit, and a few elsewhere.
    """
    free = free_bytes(device)
    if free is not None and device.type == "cpu":
        free //= processes
    most = MOST.get(device.type, MOST_ELSEWHERE)
    need = _need(model, guidance, precision)
    if free is None or need is None:
        size = most if device.type == "cuda" else UNCOUNTED
    else:
        fixed, each = need
        size = min(most, int((SHARE * max(0, free - held) - fixed) // max(1, each)))
    count = math.ceil(num / max(1, size))
    count = min(num, math.ceil(count / processes) * processes)
    return math.ceil(num / count)


def _need(model: nn.Module, guidance: float, precision: str) -> tuple[int, int] | None:
    """Bytes of a pass beyond the weights: whatever the batch, and of each sample."""
    stand_in = meta_copy(model)
    try:
        two, four = (
            sample_memory(stand_in, stand_in, size, guidance, precision)["activations"] for size in (2, 4)
        )
    except Exception:  # others' operators may raise anything on tensors without values
        return None
    each = (four - two) // 2
    return max(0, two - 2 * each), each


def _available(meminfo: Path) -> Iterator[int]:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return
    yield from (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _groups(membership: Path, root: Path) -> Iterator[tuple[int, int]]:
    """Each limit above this process, and what is used of it; a container may see its own group as the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cache = root / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            try:
                most, taken = (int((base / folder / name).read_text()) for name in (limit, used))
                stats = dict(row.split() for row in (base / folder / "memory.stat").read_text().splitlines())
                yield most, taken - int(stats.get(cache, 0))
            except (OSError, ValueError):  # no such group here, or no limit: "max"
                continue

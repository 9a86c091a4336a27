"""How many processor cores this process may use: fewer than the machine has in a Slurm task or a container."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that the scheduler gives this process, and no more than its control group's quota of processor time.

    root: where `proc` and `sys` are. Python's own count (`os.cpu_count`) is of the machine.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        cores = os.cpu_count() or 1
    quota = _quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def limit_threads(root: Path = Path("/")) -> None:
    """Have PyTorch, when it is loaded, use no more threads than a container's quota allows, unless the user said.

    It takes as many as there are cores: 64 that share a quota of 2 spend each period's time at once and then all wait.
    """
    cores = usable_cores(root)
    if "OMP_NUM_THREADS" not in os.environ and _quota(root) is not None:
        os.environ["OMP_NUM_THREADS"] = str(cores)


def _quota(root: Path) -> float | None:
    """Processors that the control groups of this process allow it (Linux); None where they set no limit."""
    found = []
    for files in _folders(root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (file := files / "cpu.max").is_file():  # version 2: "quota period", or "max period"
                quota, period = file.read_text().split()
            else:  # version 1: two files, -1 for no limit
                quota, period = ((files / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                found.append(int(quota) / int(period))
    return min(found, default=None)


def _folders(root: Path) -> list[Path]:
    """The folders of the control groups of this process that may limit its processors, and of their parents."""
    groups = root / "sys" / "fs" / "cgroup"
    found = []
    with contextlib.suppress(OSError):
        for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                base = groups
            elif "cpu" in controllers.split(","):
                base = groups / "cpu"
            else:
                continue
            inside = Path(path.lstrip("/"))
            found += [base / part for part in (inside, *inside.parents)]
    return found


__all__ = ["limit_threads", "usable_cores"]

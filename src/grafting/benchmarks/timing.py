"""Timing of things side by side, and the device's own ceilings to hold them against."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from grafting.errors import GraftError

Work = Callable[[], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Side of a square matrix, and bytes of a tensor, that show what a kind of device reaches at best.
PROBES = {"cuda": (8192, 1 << 29)}
PROBE_ELSEWHERE = (1536, 1 << 26)
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def as_dtype(name: str) -> torch.dtype:
    """The type of that name. Raises GraftError."""
    if name not in DTYPES:
        raise GraftError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def device_name(device: torch.device) -> str:
    """What a benchmark ran on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """While inside, glibc keeps freed memory of large CPU tensors instead of asking the kernel for it every time.

    Otherwise a tensor above 32 MB is mapped and zeroed anew at each allocation, which is timed as if it were work.
    """
    mallopt = None
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 65536)
        mallopt(_TRIM_THRESHOLD, 128 * 1024)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Work, device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def side_by_side(
    works: Mapping[str, Work], device: torch.device, *, repeats: int = 5, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Median, least and largest seconds of each, in turns, so that a change of the machine's load meets all of them."""
    for _ in range(warmup):
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            seconds[name].append(seconds_of(work, device))
    return {
        name: {"median_s": statistics.median(found), "min_s": min(found), "max_s": max(found)}
        for name, found in seconds.items()
    }


def ceilings(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> dict[str, float]:
    """What the device reaches at best: FLOP/s of a large matrix product, bytes/s of a large copy (read and written)."""
    side, size = PROBES.get(device.type, PROBE_ELSEWHERE)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    found = side_by_side(
        {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, repeats=repeats, warmup=2
    )
    return {
        "matmul_flops_per_s": 2.0 * side**3 / found["matmul"]["min_s"],
        "copy_bytes_per_s": 2.0 * source.nbytes / found["copy"]["min_s"],
    }


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Exponent p of the least-squares line log(seconds) = p log(size) + c."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())

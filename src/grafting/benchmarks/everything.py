"""All benchmarks one after the other: one command on a machine that is there for an hour."""

from __future__ import annotations

import time
from typing import Any

from grafting.errors import GraftError

# What is asked of each kind of machine (device, then benchmark and its options); `tiny` tries the script.
# stage1-memory counts and has no device.
Job = tuple[str, dict[str, Any]]
_GPU = {"dtype": "bfloat16", "device": "cuda"}
JOBS: dict[str, tuple[Job, ...]] = {
    "cuda": (
        ("operators", {**_GPU, "size": "XL/2-256", "batch_size": 64, "growth": False, "repeats": 20}),
        ("operators", {**_GPU, "size": "XL-4096", "batch_size": 2, "repeats": 10}),
        ("operators", {**_GPU, "size": "PixArt-2K", "batch_size": 2, "growth": False, "repeats": 10}),
        ("stage1", {**_GPU, "size": "XL/2-256", "updates": 100, "jobs": 1}),
        ("stage1", {**_GPU, "size": "XL/2-256", "updates": 100, "jobs": 1, "reuse": 4}),
        ("stage1", {**_GPU, "size": "XL/2-256", "updates": 100, "jobs": 1, "layers": "all"}),
        ("stage2", {**_GPU, "size": "XL/2-256", "batch_size": 256, "micro_batch": 64, "updates": 10, "mode": "both"}),
        ("sample", {**_GPU, "size": "XL/2-256", "batch_size": 64, "steps": 10, "mode": "both"}),
        ("depth", {**_GPU, "size": "XL/2", "repeats": 50, "mode": "both"}),
        ("stage1-memory", {"size": "PixArt-Sigma-2K"}),
    ),
    "cpu": (
        ("operators", {"size": "XL-4096"}),
        ("stage1", {"updates": 100}),
        ("stage1", {"updates": 100, "layers": "all"}),
        ("stage2", {}),
        ("sample", {}),
        ("depth", {"size": "XL/2"}),
        ("stage1-memory", {"size": "PixArt-Sigma-2K@1024x1024"}),
    ),
}  # fmt: skip
_TINY: dict[str, dict[str, Any]] = {
    "operators": {"size": "dit-fashion", "batch_size": 1, "repeats": 1, "growth": False},
    "stage1": {"size": "S/8-D2", "updates": 2, "batch_size": 4, "jobs": 1},
    "stage2": {
        "size": "S/8-D2",
        "updates": 1,
        "batch_size": 4,
        "micro_batch": 2,
        "repeats": 1,
        "mode": "eager",
    },
    "sample": {"size": "S/8-D2", "batch_size": 2, "steps": 2, "repeats": 1, "mode": "eager"},
    "depth": {"size": "S/8-D2", "batch_size": 1, "repeats": 1, "mode": "eager"},
    "stage1-memory": {"size": "DiT-S/8-D28"},
}


def bench_all(*, device: str = "cpu", size: str = "real") -> dict[str, Any]:
    """Every benchmark at the sizes for that kind of device; size `tiny`: the same list, each made small.

    One that fails is recorded with its error, and the others go on. Raises GraftError.
    """
    from grafting.benchmarks import run_benchmark
    from grafting.loading import as_device
    from grafting.runs import environment

    if size not in ("real", "tiny"):
        raise GraftError(f"unknown size {size!r}: expected real or tiny")
    kind = as_device(device).type
    results: list[dict[str, Any]] = []
    for what, given in JOBS["cuda" if size == "tiny" else kind if kind in JOBS else "cpu"]:
        options = dict(given)
        if size == "tiny":
            options |= _TINY[what]
        if what != "stage1-memory":
            options["device"] = device
            if size == "tiny" and kind == "cpu":
                options["dtype"] = "float32"
        started = time.perf_counter()
        try:
            found = run_benchmark(what, **options)
        except Exception as error:  # an hour's figures must not be lost with the last of them
            found = {
                "benchmark": what,
                "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            }
        results.append({"options": options, "wall_s": time.perf_counter() - started, **found})
    return {
        "benchmark": "all",
        "size": size,
        "device": device,
        "results": results,
        "environment": environment(),
    }

"""Stage 1: all operators in one pass against the published way, one job per operator on cached teacher activations,
over the same number of updates. Every side runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from typing import Any

_PLAN = [{"replace": {"target": "mha", "layers": "interleaved-50", "with": "hyena_x"}}]


def bench_stage1(*, updates: int = 40, batch_size: int = 64) -> dict[str, Any]:
    """Half of the attention of dit-fashion -> hyena_x: seconds, disk and memory of both ways, and their ratios."""
    from grafting.runs import environment

    samples = min(updates * batch_size, 2000)
    one = _in_process(_one_pass, updates, batch_size)
    jobs = [_in_process(_one_job, layer, updates, batch_size, samples) for layer in one["layers"]]
    training, extraction = sum(job["training_s"] for job in jobs), sum(job["extraction_s"] for job in jobs)
    return {
        "benchmark": "stage1",
        "updates": updates,
        "batch_size": batch_size,
        "operators": len(jobs),
        "one_pass": {"seconds": one["seconds"], "peak_memory_gb": one["peak_memory_gb"], "disk_gb": 0.0},
        "one_job_per_operator": {
            "training_s": training,
            "extraction_s": extraction,
            "cached_samples": samples,
            "peak_memory_gb": max(job["peak_memory_gb"] for job in jobs),
            "disk_gb": sum(job["disk_gb"] for job in jobs),
        },
        "ratio_without_extraction": training / one["seconds"],
        "ratio_with_extraction": (training + extraction) / one["seconds"],
        "environment": environment(),
    }


def _in_process(work: Any, *arguments: Any) -> dict[str, Any]:
    """The result of `work(*arguments)` from a fresh process, with its peak memory."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (work, arguments))


def _measured(work: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    found = work(*arguments)
    scale = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss: bytes there, kilobytes here
    return {**found, "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}


def _setting(plan: Any) -> tuple[Any, Any, Any]:
    import grafting
    from grafting.data import load_dataset

    teacher = grafting.load_model("dit-fashion")
    return teacher, grafting.graft(teacher, grafting.GraftPlan.from_dict(plan)), load_dataset("fashion-10")


def _config(updates: int, batch_size: int, **more: Any) -> dict[str, Any]:
    """Training only: no fit, no validation, so that both sides do the same updates and nothing else."""
    return {
        "steps": updates, "batch_size": batch_size, "fit_readout": False, "num_validation": 0,
        "keep_best": False, **more,
    }  # fmt: skip


def _one_pass(updates: int, batch_size: int) -> dict[str, Any]:
    import grafting
    from grafting.surgery import edited_sites

    teacher, student, data = _setting(_PLAN)
    grafting.distill(student, teacher, data, _config(2, batch_size))
    started = time.perf_counter()
    grafting.distill(student, teacher, data, _config(updates, batch_size))
    return {
        "seconds": time.perf_counter() - started,
        "layers": sorted(site.layer for site, _ in edited_sites(student).values()),
    }


def _one_job(layer: int, updates: int, batch_size: int, samples: int) -> dict[str, Any]:
    import grafting

    plan = [{"replace": {"target": "mha", "layers": [layer], "with": "hyena_x"}}]
    teacher, student, data = _setting(plan)
    cached = {"mode": "cached", "cache_samples": samples}
    grafting.distill(student, teacher, data, _config(2, batch_size, mode="cached", cache_samples=batch_size))
    started = time.perf_counter()
    result = grafting.distill(student, teacher, data, _config(updates, batch_size, **cached))
    total = time.perf_counter() - started
    return {
        "training_s": total - result.extraction_seconds,
        "extraction_s": result.extraction_seconds,
        "disk_gb": result.cache_bytes / 1e9,
    }

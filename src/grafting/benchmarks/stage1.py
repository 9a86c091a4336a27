"""Stage 1: all operators in one pass against the published way, one job per operator on cached teacher activations,
over the same number of updates. Every side runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from typing import Any

from grafting.errors import GraftError

VISITS = 8000 * 200  # of the published stage 1: samples times epochs


def bench_stage1(
    *, size: str = "dit-fashion", updates: int = 40, batch_size: int = 64, layers: str = "interleaved-50",
    jobs: int | None = None, device: str = "cpu", dtype: str = "auto", reuse: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """The attention of some layers -> hyena_x: seconds, disk and memory of both ways, and their ratios.

    jobs: how many of the published way's jobs are run, for all of them (default: all). reuse: as `distill.reuse`.
    """
    from grafting.benchmarks.stage2 import PRECISIONS
    from grafting.loading import as_device
    from grafting.runs import environment

    if dtype not in PRECISIONS:
        raise GraftError(f"unknown dtype {dtype!r}: expected one of {', '.join(PRECISIONS)}")
    as_device(device)
    setting = {"size": size, "device": device, "precision": PRECISIONS[dtype], "layers": layers}
    samples = min(updates * batch_size, 2000)
    one = _in_process(_one_pass, setting, updates, batch_size, reuse)
    numbers = one["layers"][:jobs]
    found = [_in_process(_one_job, setting, layer, updates, batch_size, samples) for layer in numbers]
    count = len(one["layers"])
    times = count / len(found)
    training, extraction = (times * sum(job[key] for job in found) for key in ("training_s", "extraction_s"))
    return {
        "benchmark": "stage1",
        **setting,
        "updates": updates,
        "batch_size": batch_size,
        "reuse": reuse,
        "operators": count,
        "one_pass": {
            "seconds": one["seconds"],
            "images_per_s": updates * batch_size / one["seconds"],
            "projected_minutes_of_8k_x_200_visits": VISITS / (updates * batch_size / one["seconds"]) / 60,
            "share_of_matmul": one["flops"] / one["seconds"] / one["matmul_flops_per_s"],
            "peak_memory_gb": one["peak_memory_gb"],
            "disk_gb": 0.0,
        },
        "one_job_per_operator": {
            "jobs_run": len(found),
            "training_s": training,
            "extraction_s": extraction,
            "share_of_matmul": times
            * sum(job["flops"] for job in found)
            / (training + extraction)
            / one["matmul_flops_per_s"],
            "cached_samples": samples,
            "peak_memory_gb": max(job["peak_memory_gb"] for job in found),
            "disk_gb": times * sum(job["disk_gb"] for job in found),
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    if arguments[0]["device"].startswith("cuda"):
        import torch

        peak = torch.cuda.max_memory_allocated(arguments[0]["device"]) / 1e9
    return {**found, "peak_memory_gb": peak}


def _models(setting: dict[str, str], layers: Any) -> tuple[Any, Any, Any]:
    import torch

    from grafting.benchmarks.models import data_for, teacher_and_student

    plan = [{"replace": {"target": "mha", "layers": layers, "with": "hyena_x"}}]
    teacher, student = teacher_and_student(setting["size"], torch.device(setting["device"]), plan)
    return teacher, student, data_for(teacher)


def _config(setting: dict[str, str], updates: int, batch_size: int, **more: Any) -> dict[str, Any]:
    """Training only: no fit, no validation, so that both sides do the same updates and nothing else."""
    return {
        "steps": updates, "batch_size": batch_size, "fit_readout": False, "num_validation": 0,
        "keep_best": False, "precision": setting["precision"], **more,
    }  # fmt: skip


def _one_pass(setting: dict[str, str], updates: int, batch_size: int, reuse: int) -> dict[str, Any]:
    import torch

    import grafting
    from grafting.benchmarks.timing import ceilings
    from grafting.surgery import edited_sites
    from grafting.training.compute import make_compute

    teacher, student, data = _models(setting, setting["layers"])
    grafting.distill(student, teacher, data, _config(setting, 2, batch_size))
    started = time.perf_counter()
    result = grafting.distill(student, teacher, data, _config(setting, updates, batch_size, reuse=reuse))
    seconds = time.perf_counter() - started
    compute = make_compute(torch.device(setting["device"]), setting["precision"])
    kind = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    return {
        "seconds": seconds,
        "flops": result.flops,
        "layers": sorted(site.layer for site, _ in edited_sites(student).values()),
        **ceilings(compute.device, kind),
    }


def _one_job(
    setting: dict[str, str], layer: int, updates: int, batch_size: int, samples: int
) -> dict[str, Any]:
    import grafting

    teacher, student, data = _models(setting, [layer])
    cached = {"mode": "cached", "cache_samples": samples}
    grafting.distill(
        student, teacher, data,
        _config(setting, 2, batch_size, mode="cached", cache_samples=batch_size),
    )  # fmt: skip
    started = time.perf_counter()
    result = grafting.distill(student, teacher, data, _config(setting, updates, batch_size, **cached))
    total = time.perf_counter() - started
    return {
        "training_s": total - result.extraction_seconds,
        "extraction_s": result.extraction_seconds,
        "flops": result.flops,
        "disk_gb": result.cache_bytes / 1e9,
    }

"""Sampling: images a second of teacher and student against the student in the published code's plain forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from grafting.benchmarks.models import teacher_and_student
from grafting.benchmarks.published import published_form
from grafting.benchmarks.stage2 import PRECISIONS
from grafting.benchmarks.timing import ceilings, device_name, kept_memory, side_by_side
from grafting.errors import GraftError

GUIDANCE = 1.5


def bench_sample(
    *, size: str = "dit-fashion", batch_size: int = 100, steps: int = 4, repeats: int = 3, device: str = "cpu",
    dtype: str = "auto", mode: str = "eager",
) -> dict[str, Any]:  # fmt: skip
    """One batch by `steps` steps of DDIM with guidance (two passes a step in one batch), models in turns.

    The published form computes in float32, ours in `dtype` (auto: bfloat16 where that is faster). mode: eager, compiled
    or both. Raises GraftError.
    """
    from grafting.families import family_of
    from grafting.loading import as_device
    from grafting.runs import environment
    from grafting.training.acceleration import compiled
    from grafting.training.compute import make_compute

    if dtype not in PRECISIONS:
        raise GraftError(f"unknown dtype {dtype!r}: expected one of {', '.join(PRECISIONS)}")
    modes = {"eager": [False], "compiled": [True], "both": [False, True]}.get(mode)
    if modes is None:
        raise GraftError(f"unknown mode {mode!r}: expected eager, compiled or both")
    place = as_device(device)
    precision = make_compute(place, PRECISIONS[dtype]).precision
    teacher, student = teacher_and_student(size, place)
    kinds: dict[str, tuple[nn.Module, str]] = {
        "published": (published_form(student), "fp32"),
        "teacher": (teacher, precision),
        "student": (student, precision),
    }
    family, rows = family_of(student), list[dict[str, Any]]()
    with kept_memory(place):
        peaks = {kind: ceilings(place, _TYPES[kind]) for kind in {"fp32", precision}}
        for compile in modes:
            blocks = [b for model in (teacher, student) for b in family.compilable(model)]
            with compiled(blocks, compile, place):
                works = {
                    name: _draw(model, kind, batch_size, steps, place)
                    for name, (model, kind) in kinds.items()
                }
                found = side_by_side(works, place, repeats=repeats)
            base = found["published"]["median_s"]
            for name, (_, kind) in kinds.items():
                # The plain form has the student's FLOPs.
                flops = (
                    2 * steps * batch_size * family.flops_per_image(teacher if name == "teacher" else student)
                )
                seconds = found[name]["median_s"]
                rows.append({
                    "model": name, "mode": "compiled" if compile and name != "published" else "eager",
                    "precision": kind, "seconds": seconds, "images_per_s": batch_size / seconds,
                    "ratio": base / seconds, "share_of_matmul": flops / seconds / peaks[kind]["matmul_flops_per_s"],
                })  # fmt: skip
    return {
        "benchmark": "sample", "size": size, "batch_size": batch_size, "steps": steps, "guidance": GUIDANCE,
        "repeats": repeats, "device": device_name(place), "ceilings": peaks, "rows": rows, "environment": environment(),
    }  # fmt: skip


_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _draw(
    model: nn.Module, precision: str, batch: int, steps: int, device: torch.device
) -> Callable[[], object]:
    from grafting.diffusion import sample
    from grafting.families import family_of
    from grafting.training.compute import Compute

    family = family_of(model)
    noise = torch.randn(batch, *family.sample_shape(model), device=device)
    condition = family.example_condition(model, batch)

    def work() -> object:
        with Compute(device, precision).autocast():
            return sample(model, noise, condition, steps=steps, guidance=GUIDANCE)

    return work

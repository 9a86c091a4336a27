"""Depth to width: one forward pass with branches that run as one, with branches in sequence, and of the unedited model.

All three have random weights of one seed: values matter to neither time. The paper's condition is one forward pass at
batch 2 (arXiv 2506.05340, "depth to width").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from grafting.benchmarks.timing import as_dtype, ceilings, device_name, side_by_side
from grafting.errors import GraftError

MODES = ("eager", "compiled", "both")


def bench_depth(
    *, size: str = "XL/2", batch_size: int = 2, device: str = "cpu", dtype: str = "float32", repeats: int = 5,
    mode: str = "eager", merge: str = "concat",
) -> dict[str, Any]:  # fmt: skip
    """Pairs of blocks of `arch:DiT-<size>` side by side: seconds of each way, and ratios against the teacher.

    size: XL/2, XL/2-512, or with another depth, XL/2-D4. mode: eager, compiled (torch.compile), or both. At bfloat16
    and float16 the weights are in that type. Raises GraftError.
    """
    from grafting.depth import in_sequence
    from grafting.families import family_of
    from grafting.loading import as_device, load_model
    from grafting.plan import GraftPlan, Parallelize
    from grafting.runs import environment
    from grafting.surgery import graft

    kind = as_dtype(dtype)
    if mode not in MODES:
        raise GraftError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    place = as_device(device)
    teacher = load_model(f"arch:DiT-{size}", device=place, dtype=kind).eval()
    student = graft(teacher, GraftPlan([Parallelize("pairs", merge)]))
    models = {"teacher": teacher, "as one": student, "in sequence": in_sequence(family_of(student), student)}
    flops, depth, params = _counts(models)
    rows: list[dict[str, Any]] = []
    peak = ceilings(place, kind)
    for how in ("eager", "compiled") if mode == "both" else (mode,):
        passes = {name: _forward(model, batch_size, how == "compiled") for name, model in models.items()}
        times = side_by_side(passes, place, repeats=repeats, warmup=3 if how == "compiled" else 1)
        rows += [
            {
                "branches": name, "mode": how, "depth": depth[name], "params": params[name],
                "flops_per_image": flops[name], **{key.replace("_s", "_ms"): 1e3 * s for key, s in times[name].items()},
                "speedup": times["teacher"]["median_s"] / times[name]["median_s"],
                "share_of_matmul": batch_size * flops[name] / times[name]["median_s"] / peak["matmul_flops_per_s"],
            }
            for name in models
        ]  # fmt: skip
    by_place = {(row["mode"], row["branches"]): row["median_ms"] for row in rows}
    return {
        "benchmark": "depth",
        "what": "one forward pass without gradients",
        "model": f"DiT-{size}",
        "merge": merge,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device_name(place),
        "ceilings": peak,
        "repeats": repeats,
        "rows": rows,
        "as_one_over_in_sequence": {
            how: by_place[how, "in sequence"] / by_place[how, "as one"]
            for how in dict.fromkeys(row["mode"] for row in rows)
        },
        "environment": environment(),
    }


def _counts(models: dict[str, nn.Module]) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    from grafting.families import family_of

    flops = {name: family_of(model).flops_per_image(model) for name, model in models.items()}
    depth = {name: len(family_of(model).block_paths(model)) for name, model in models.items()}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return flops, depth, params


def _forward(model: nn.Module, batch_size: int, compiled: bool) -> Callable[[], object]:
    from grafting.families import family_of

    family, like = family_of(model), next(model.parameters())
    run = torch.compile(model) if compiled else model
    x = torch.randn(batch_size, *family.sample_shape(model), device=like.device)
    t = torch.full((batch_size,), 500, device=like.device)
    cond = family.example_condition(model, batch_size)

    def work() -> object:
        with torch.no_grad():
            return run(x, t, cond)

    return work

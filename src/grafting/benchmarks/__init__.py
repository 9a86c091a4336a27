"""`graft bench`: two ways of one thing in one run, as ratios; a module per benchmark."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from grafting.errors import GraftError

ABOUT = {
    "all": "every other one, at the sizes that --device is made for, as one JSON",
    "depth": "pairs of blocks side by side, run as one and in sequence, against the unedited model",
    "operators": "every operator's core and whole, against the plain published form and against attention",
    "stage1-memory": "stage 1 of PixArt: one operator per job, one graph at a time, all graphs at once",
    "sample": "teacher and student against the student in the published code's plain forms",
    "stage1": "all operators in one pass, against one job per operator on stored activations",
    "stage2": "finetuning, against an eager loop of the published kind",
}


def run_benchmark(what: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark by name; `options` that are None keep their default. Raises GraftError for unknown ones."""
    from grafting.benchmarks import depth, everything, operators, sampling, stage1, stage1_memory, stage2

    known: dict[str, Callable[..., dict[str, Any]]] = {
        "all": everything.bench_all,
        "depth": depth.bench_depth,
        "operators": operators.bench_operators,
        "sample": sampling.bench_sample,
        "stage1": stage1.bench_stage1,
        "stage1-memory": stage1_memory.bench_stage1_memory,
        "stage2": stage2.bench_stage2,
    }
    if what not in known:
        raise GraftError(f"unknown benchmark {what!r}: expected {' or '.join(known)}")
    given = {name: value for name, value in options.items() if value is not None}
    work = known[what]
    accepted = inspect.signature(work).parameters
    for name in given:
        if name not in accepted:
            raise GraftError(f"benchmark {what!r} takes no {name!r}; it takes {', '.join(accepted)}")
    return work(**given)

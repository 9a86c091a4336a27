"""`graft bench`: two ways of one thing in one run, as ratios; a module per benchmark."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from grafting.errors import GraftError

ABOUT = {
    "depth": "pairs of blocks side by side, run as one and in sequence, against the unedited model",
    "operators": "every operator's core and whole, against the plain published form and against attention",
    "stage1": "all operators in one pass, against one job per operator on stored activations",
}


def run_benchmark(what: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark by name; `options` that are None keep their default. Raises GraftError for unknown ones."""
    from grafting.benchmarks import depth, operators, stage1

    known: dict[str, Callable[..., dict[str, Any]]] = {
        "depth": depth.bench_depth,
        "operators": operators.bench_operators,
        "stage1": stage1.bench_stage1,
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

"""`compare`: two evaluations side by side, only when they were taken under the same protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grafting.errors import GraftError

# What may differ: the seed, and which model or plan made the samples (and what does not change them).
FREE_FIELDS = ("seed", "model", "plan", "graft", "base", "batch_size", "device")
RUN_FILE = "evaluation.json"  # of a run: {"teacher", "student", "comparison"}
_MAX_BYTES = 1 << 24


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Read an evaluation that `evaluate` returned, from a JSON file; `GraftError` if it is none.

    path: also a run folder or its evaluation.json, which holds those of teacher and student; the student's is read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RUN_FILE
        if not path.is_file():
            raise GraftError(
                f"{str(path.parent)!r} holds no {RUN_FILE}: expected a run folder that was evaluated"
            )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise GraftError(f"{path} is larger than {_MAX_BYTES} bytes; expected the JSON of one evaluation")
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except GraftError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise GraftError(
            f"cannot read the evaluation {path}: {error}; make it with graft evaluate"
        ) from error
    if isinstance(evaluation, dict) and "metrics" not in evaluation and "student" in evaluation:
        evaluation = evaluation["student"]
    _check(evaluation, str(path))
    return evaluation


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Compare evaluation `b` with evaluation `a` (say, student with teacher).

    Returns {"metrics": {name: {"a", "b", "difference": b - a, "ratio": b / a or None}}, "protocol": what they
    share, "differs": {field: [of a, of b]} among the fields that may}. Raises `GraftError` that names every
    other field of the protocols that differs, with both values.
    """
    _check(a, "the first evaluation")
    _check(b, "the second evaluation")
    protocol_a, protocol_b = a["protocol"], b["protocol"]
    fields = sorted(set(protocol_a) | set(protocol_b))
    unlike = [field for field in fields if protocol_a.get(field) != protocol_b.get(field)]
    refused = [field for field in unlike if field not in FREE_FIELDS]
    if refused:
        values = "; ".join(
            _difference(field, protocol_a.get(field), protocol_b.get(field)) for field in refused
        )
        raise GraftError(f"the evaluations are of unlike protocols: {values}; sample and evaluate both alike")
    metrics_a, metrics_b = a["metrics"], b["metrics"]
    if set(metrics_a) != set(metrics_b):
        only = ", ".join(sorted(set(metrics_a) ^ set(metrics_b)))
        raise GraftError(f"only one of the evaluations has: {only}; evaluate both alike")
    return {
        "metrics": {name: _row(float(metrics_a[name]), float(metrics_b[name])) for name in metrics_a},
        "protocol": {field: protocol_a.get(field) for field in fields if field not in FREE_FIELDS},
        "differs": {field: [protocol_a.get(field), protocol_b.get(field)] for field in unlike},
    }


def _row(a: float, b: float) -> dict[str, float | None]:
    return {"a": a, "b": b, "difference": b - a, "ratio": b / a if a != 0 else None}


def _difference(field: str, a: object, b: object) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in sorted(set(a) | set(b)) if a.get(key) != b.get(key)]
        return "; ".join(f"{field}.{key} {a.get(key)!r} and {b.get(key)!r}" for key in keys)
    return f"{field} {a!r} and {b!r}"


def _check(evaluation: object, what: str) -> None:
    if not isinstance(evaluation, Mapping):
        raise GraftError(f"{what} must be a JSON object, got {type(evaluation).__name__}")
    for key in ("metrics", "protocol"):
        if not isinstance(evaluation.get(key), Mapping):
            raise GraftError(f"{what} has no {key!r} object; expected what graft evaluate writes")
    for name, value in evaluation["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise GraftError(f"{what}: metric {name!r} must be a finite number, got {value!r}")

"""What the numbers of a study say, computed: a difference counts only beyond what noise alone does.

Noise is measured by the teacher: the standard deviation of its Frechet distance over noise seeds. A finding "A is
better than B" holds where B's distance exceeds A's by more than two of these, does not hold where A's exceeds B's by
as much, and is not distinguishable between.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from grafting.recipes.rows import Claim, Study

HOLDS, FAILS, UNCLEAR, OPEN = "holds", "does not hold", "not distinguishable", "not run"
DEVIATIONS = 2.0
Rows = Mapping[str, Mapping[str, Any]]


def noise_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Teacher against teacher: {"seeds", "mean", "deviation" (sample standard deviation; None under two seeds)}."""
    values = [
        float(row["distance"]) for row in rows if row.get("unedited") and row.get("distance") is not None
    ]
    return {
        "seeds": len(values),
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def test_claims(study: Study, rows: Rows, noise: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim of the study: {"text", "verdict", "figures", "paper", "gap", "margin"}."""
    return [_tested(claim, rows, noise) for claim in study.claims]


def _tested(claim: Claim, rows: Rows, noise: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for group in claim.groups for name in group]
    values = {name: _value(rows.get(name, {})) for name in names}
    found: dict[str, Any] = {
        "text": claim.text,
        "verdict": OPEN,
        "figures": _listed(claim, {name: _shown(rows.get(name, {})) for name in names}),
        "paper": _listed(claim, {name: _paper(rows.get(name, {})) for name in names}),
        "gap": None,
        "margin": None,
    }
    missing = [name for name, value in values.items() if value is None]
    deviation = noise.get("deviation")
    if missing or deviation is None:
        found["why"] = f"not run: {', '.join(missing)}" if missing else "the teacher has too few noise seeds"
        return found
    known = {name: value for name, value in values.items() if value is not None}
    if claim.over is not None:
        limit = claim.over * float(noise["mean"])
        lowest = min(known.values())
        return found | {
            "verdict": HOLDS if lowest > limit else FAILS,
            "gap": _finite(lowest - limit),
            "margin": 0.0,
        }
    margin = DEVIATIONS * deviation
    gaps = []
    for better, worse in zip(claim.groups, claim.groups[1:], strict=False):
        low, high = max(known[name] for name in better), min(known[name] for name in worse)
        gaps.append(0.0 if low == high else high - low)
    verdict = FAILS if min(gaps) < -margin else HOLDS if min(gaps) > margin else UNCLEAR
    return found | {"verdict": verdict, "gap": _finite(min(gaps)), "margin": margin}


def _value(row: Mapping[str, Any]) -> float | None:
    return math.inf if row.get("diverged") else row.get("distance")


def _shown(row: Mapping[str, Any]) -> str:
    if row.get("diverged"):
        return "diverged"
    distance = row.get("distance")
    return "–" if distance is None else f"{distance:.2f}"


def _paper(row: Mapping[str, Any]) -> str:
    value = row.get("paper_fid")
    return "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _listed(claim: Claim, shown: Mapping[str, str]) -> str:
    """Groups in order: 6.1, 6.3 < 7.2."""
    return " < ".join(", ".join(shown[name] for name in group) for group in claim.groups)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sentences(study: Study, claims: Sequence[Mapping[str, Any]], noise: Mapping[str, Any]) -> list[str]:
    """The findings in words, those that were tested."""
    found = []
    if noise.get("deviation") is not None:
        found.append(
            f"Noise: over {noise['seeds']} noise seeds the teacher's distance is {noise['mean']:.2f} with a standard "
            f"deviation of {noise['deviation']:.2f}; a difference counts beyond {DEVIATIONS * noise['deviation']:.2f}."
        )
    tested = [claim for claim in claims if claim["verdict"] != OPEN]
    if tested:
        counts = {
            verdict: sum(c["verdict"] == verdict for c in tested) for verdict in (HOLDS, FAILS, UNCLEAR)
        }
        found.append(
            f"Of {len(tested)} findings of the paper {counts[HOLDS]} hold here, {counts[FAILS]} do not, "
            f"{counts[UNCLEAR]} can't be told from noise."
        )
    return found

"""What the numbers of a study say, computed: a difference counts only beyond what noise alone does.

Noise is measured by the teacher: the standard deviation of its Frechet distance over noise seeds. A finding "A is
better than B" holds where B's distance exceeds A's by more than two of these, does not hold where A's exceeds B's by
as much, and is not distinguishable between. Nothing is tested before every noise seed of the study is in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from grafting.recipes.rows import Claim, Study

HOLDS, FAILS, UNCLEAR, OPEN = "holds", "does not hold", "not distinguishable", "not tested"
DEVIATIONS = 2.0
Rows = Mapping[str, Mapping[str, Any]]


def noise_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Teacher against teacher: {"seeds", "missing", "mean", "deviation", "margin"}.

    missing: names of its rows without a distance. deviation: the sample standard deviation; None under two seeds.
    margin: what a difference must exceed to count.
    """
    teachers = [row for row in rows if row.get("unedited")]
    values = [float(row["distance"]) for row in teachers if row.get("distance") is not None]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "seeds": len(values),
        "missing": [str(row.get("name")) for row in teachers if row.get("distance") is None],
        "mean": statistics.fmean(values) if values else None,
        "deviation": deviation,
        "margin": None if deviation is None else DEVIATIONS * deviation,
    }


def test_claims(study: Study, rows: Rows, noise: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim of the study: {"text", "verdict", "figures", "paper", "own", "gap", "margin", "why"?}.

    own: it is a claim of ours, not of the paper. gap: how far the groups are apart, negative the wrong way round; None
    where a row diverged. why: of a claim that can't be tested yet, what it lacks.
    """
    return [_tested(claim, rows, noise) for claim in study.claims]


def _tested(claim: Claim, rows: Rows, noise: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for group in claim.groups for name in group]
    values = {name: _value(rows.get(name, {})) for name in names}
    found: dict[str, Any] = {
        "text": claim.text,
        "verdict": OPEN,
        "figures": _listed(claim, {name: _shown(rows.get(name, {})) for name in names}),
        "paper": _listed(claim, {name: _paper(rows.get(name, {})) for name in names}),
        "own": not claim.paper,
        "gap": None,
        "margin": None,
    }
    missing = [name for name, value in values.items() if value is None]
    deviation = noise.get("deviation")
    silent = list(noise.get("missing", ()))
    reasons = [_without(missing, rows)] if missing else []
    if silent:
        reasons.append(f"noise seeds of the teacher: {_without(silent, rows)}")
    elif deviation is None:
        reasons.append("the teacher has too few noise seeds")
    if reasons or deviation is None:
        return found | {"why": "; ".join(reasons)}
    known = {name: value for name, value in values.items() if value is not None}
    if claim.over is not None:  # the limit is a multiple of a noisy distance, and so is its noise
        gap = min(known.values()) - claim.over * float(noise["mean"])
        margin = float(noise["margin"]) * claim.over
        return found | {"verdict": _verdict(gap, margin), "gap": _finite(gap), "margin": margin}
    margin = float(noise["margin"])
    gaps = []
    for better, worse in zip(claim.groups, claim.groups[1:], strict=False):
        low, high = max(known[name] for name in better), min(known[name] for name in worse)
        gaps.append(0.0 if low == high else high - low)
    return found | {"verdict": _verdict(min(gaps), margin), "gap": _finite(min(gaps)), "margin": margin}


def _verdict(gap: float, margin: float) -> str:
    return FAILS if gap < -margin else HOLDS if gap > margin else UNCLEAR


def _without(names: Sequence[str], rows: Rows) -> str:
    """Rows without a distance, by what became of them: "failed: a, b; left out: c; not run: d"."""
    kinds: dict[str, list[str]] = {"failed": [], "left out": [], "not run": []}
    for name in names:
        failed = rows.get(name, {}).get("failed")
        kinds["failed" if failed else "not run" if failed is None else "left out"].append(name)
    return "; ".join(f"{kind}: {', '.join(found)}" for kind, found in kinds.items() if found)


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
    """The noise, and the verdicts counted: the paper's findings, then claims of our own."""
    found = []
    if (deviation := noise.get("deviation")) is not None:
        missing = len(noise.get("missing", ()))
        seeds = f"{noise['seeds']} of {noise['seeds'] + missing}" if missing else str(noise["seeds"])
        counts = (
            "no finding is tested before all are run"
            if missing
            else f"a difference counts beyond {noise['margin']:.2f}"
        )
        found.append(
            f"Noise: over {seeds} noise seeds the teacher's distance is {noise['mean']:.2f} with a standard deviation "
            f"of {deviation:.2f}; {counts}."
        )
    for own, singular, plural in (
        (False, "finding of the paper", "findings of the paper"), (True, "claim of our own", "claims of our own"),
    ):  # fmt: skip
        verdicts = [claim["verdict"] for claim in claims if bool(claim.get("own")) is own]
        if verdicts:
            found.append(_counted(verdicts, singular if len(verdicts) == 1 else plural))
    return found


def _counted(verdicts: Sequence[str], what: str) -> str:
    holds, fails, unclear, opened = (verdicts.count(kind) for kind in (HOLDS, FAILS, UNCLEAR, OPEN))
    rest = f"; {opened} not tested" if opened else ""
    return (
        f"Of {len(verdicts)} {what} {holds} {'holds' if holds == 1 else 'hold'} here, {fails} "
        f"{'does' if fails == 1 else 'do'} not, {unclear} can't be told from noise{rest}."
    )

"""Study `depth-to-width`: pairs of blocks side by side against blocks dropped, equal image visits, three seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from grafting.recipes.rows import Claim, Row, Study

SEEDS = (0, 1, 2)
# Table of arXiv 2506.05340: ImageNet-1K 256x256, guidance. Parameters in millions, None where it names none.
PUBLISHED: tuple[tuple[str, int, int | None, float], ...] = (
    ("DiT-XL/2 (the teacher)", 28, 675, 2.27),
    ("DiT-XL/2 with 14 pairs side by side", 14, 712, 2.77),
    ("TinyDiT-D14 with masked distillation", 14, 340, 2.86),
    ("BK-SDM", 14, None, 7.43),
    ("U-ViT-L", 21, None, 3.44),
    ("DiT-L/2", 24, None, 3.73),
)
_CONCAT, _RESIDUAL = (
    [{"parallelize": {"groups": "pairs", "merge": merge}}] for merge in ("concat", "residual")
)
_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "concat": ("6 pairs side by side, concat", {"plan": _CONCAT}),
    "concat-stage-1": ("6 pairs side by side, concat, stage 1 only", {"plan": _CONCAT, "finetune": None}),
    "residual": ("6 pairs side by side, residual", {"plan": _RESIDUAL}),
    "residual-stage-1": ("6 pairs side by side, residual, stage 1 only", {"plan": _RESIDUAL, "finetune": None}),
    "prune": (
        "every second block dropped",
        {"plan": [{"prune": {"layers": "interleaved-50"}}], "distill": None},
    ),
}  # fmt: skip


def _rows(seed: int) -> list[Row]:
    teacher = "as it is" if seed == 0 else "other noise"
    rows = [Row(f"teacher-s{seed}", f"teacher, seed +{seed}", teacher=teacher, seed=seed, rank=seed)]
    for way, (label, changes) in _WAYS.items():
        times = {"finetune.steps": 600 / 350} if way == "prune" else {}
        rows.append(
            Row(f"{way}-s{seed}", f"{label}, seed +{seed}", changes, seed=seed, rank=seed, times=times)
        )
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the errors at step 0, and the published comparison, as further tables."""
    by_name = {row["name"]: row for row in rows}
    over_seeds = []
    for way, label in (("teacher", "teacher"), *((way, label) for way, (label, _) in _WAYS.items())):
        done = [by_name[f"{way}-s{seed}"] for seed in SEEDS if f"{way}-s{seed}" in by_name]
        done = [row for row in done if row.get("distance") is not None]
        if not done:
            continue
        entry: dict[str, Any] = {"label": label, "seeds": len(done), "std": {}}
        entry["seeds_over"] = sum(row.get("over_teacher") is not None for row in done)
        for key in ("distance", "over_teacher", "depth", "model_params", "model_flops", "seconds"):
            values = [row[key] for row in done if row.get(key) is not None]
            entry[key] = statistics.fmean(values) if values else None
            if len(values) > 1 and key in ("distance", "over_teacher"):
                entry["std"][key] = statistics.stdev(values)
        over_seeds.append(entry)
    fewer = any(entry["seeds_over"] < entry["seeds"] for entry in over_seeds)
    tables = [
        {
            "title": "Over the seeds",
            "note": "Every seed is one of training and of noise; the distance is over the teacher's of the same noise.",
            "columns": _columns(
                ("distance", "Fréchet distance"), ("over_teacher", "over the teacher's"), ("depth", "depth"),
                ("model_params", "parameters"), ("model_flops", "FLOPs per image"), ("seconds", "training"),
                ("seeds", "seeds"), *([("seeds_over", "of these over the teacher's")] if fewer else []),
            ),
            "rows": over_seeds,
        },
        *_start_tables(by_name),
        {
            "title": "Published",
            "note": "FID at 256x256 on ImageNet, as arXiv 2506.05340 reports it: other data and another measure.",
            "columns": _columns(("depth", "depth"), ("params", "parameters, millions"), ("fid", "FID")),
            "rows": [dict(zip(("label", "depth", "params", "fid"), row, strict=True)) for row in PUBLISHED],
        },
    ]  # fmt: skip
    return {"tables": tables, "findings": _findings(over_seeds)}


def _start_tables(by_name: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per merge: the error of every group's output at step 0, random, naive and fitted, mean over the seeds."""
    tables = []
    for way, naive in (("concat", "average of the outputs"), ("residual", "sum of the updates")):
        errors = [
            found for seed in SEEDS if (found := by_name.get(f"{way}-s{seed}", {}).get("start_error")) is not None
        ]  # fmt: skip
        kinds = [kind for kind in ("random", "copied", "fitted") if errors and kind in errors[0]]
        if not kinds:
            continue
        rows = []
        for path in errors[0][kinds[0]]:
            rows.append({"label": path} | {k: statistics.fmean(e[k][path] for e in errors) for k in kinds})
        names = {"random": "random merge", "copied": naive, "fitted": "least squares"}
        tables.append({
            "title": f"Error of the group's output at step 0, {way}",
            "note": "mean |group - blocks in sequence| / mean |blocks in sequence| on held-out samples; "
                    f"mean over {len(errors)} seeds.",
            "columns": _columns(*((kind, names[kind]) for kind in kinds)), "rows": rows,
        })  # fmt: skip
    return tables


def _columns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "label": label} for key, label in pairs]


def _findings(over_seeds: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{entry['label']}: {entry['over_teacher']:.2f} times the teacher's distance "
        + ("(one seed)." if entry["seeds_over"] == 1 else f"(mean of {entry['seeds_over']}).")
        for entry in over_seeds
        if entry["over_teacher"] is not None and entry["label"] != "teacher"
    ]


def _of(way: str) -> tuple[str, ...]:
    return tuple(f"{way}-s{seed}" for seed in SEEDS)


DEPTH_TO_WIDTH = Study(
    name="depth-to-width",
    title="Depth to width against dropping blocks, on dit-fashion",
    about=(
        "Depth 12 to 6, three ways: pairs of blocks side by side with a concat or a residual merge, and every second "
        "block dropped. 38,400 image visits in each: 250 steps of stage 1 and 350 of stage 2; what drops blocks has "
        "nothing to learn in stage 1 and gets 600 steps of stage 2. Same data, three seeds of training and noise."
    ),
    recipe="dit-fashion-depth-to-width",
    rows=tuple(row for seed in SEEDS for row in _rows(seed)),
    claims=(
        Claim("Pairs side by side (concat) end nearer to the teacher than dropping every second block.",
              (_of("concat"), _of("prune"))),
        Claim("Pairs side by side (residual) end nearer to the teacher than dropping every second block.",
              (_of("residual"), _of("prune")), paper=False),
        Claim("Stage 2 brings pairs side by side (concat) nearer to the teacher than stage 1 alone.",
              (_of("concat"), _of("concat-stage-1")), paper=False),
    ),
    summarize=summarize,
)  # fmt: skip

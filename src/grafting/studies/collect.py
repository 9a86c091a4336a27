"""The table of a study, `study.json`: every row's result, the paper's figures beside it, and the findings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from grafting.formats import weights
from grafting.recipes.rows import Row
from grafting.runs import environment
from grafting.studies.findings import noise_of, sentences, test_claims
from grafting.studies.row_run import Setting, distance_of

_COLUMNS = (
    ("distance", "Fréchet distance"), ("over_teacher", "over the teacher's"), ("paper_fid", "paper: FID"),
    ("paper_over", "paper: over its baseline's"), ("label_accuracy", "label accuracy"), ("precision", "precision"),
    ("recall", "recall"), ("is", "inception score"), ("depth", "depth"), ("flops_op_pct", "operator FLOPs, %"),
    ("flops_ft_pct", "projections' FLOPs, %"), ("params_pct", "parameters, %"), ("model_flops", "FLOPs per image"),
    ("model_params", "parameters"), ("share_of_pretraining", "share of pretraining FLOPs"), ("status", "status"),
)  # fmt: skip
_ALWAYS = ("distance", "over_teacher")
_VARIED = re.compile(r"-(?:50|75|100|s\d+|noise-\d+|lr[0-9e.-]+)$")  # the end of a row's name


def collect(setting: Setting) -> dict[str, Any]:
    """Read the results of all rows, write study.json, return it."""
    study = setting.study
    rows = [_entry(setting, row) for row in study.rows]
    teachers = {
        row["seed"]: row["distance"] for row in rows if row["unedited"] and row["distance"] is not None
    }
    # a teacher's result holds no depth; every student's holds that of its teacher
    depth = next((row["teacher_depth"] for row in rows if row["teacher_depth"] is not None), None)
    whole = {row.name for row in study.rows if row.teacher is not None}
    for row in rows:
        teacher = teachers.get(row["seed"])
        if row["depth"] is None and row["name"] in whole:
            row["depth"] = depth
        row["over_teacher"] = row["distance"] / teacher if row["distance"] is not None and teacher else None
        fid = row["paper_fid"]
        row["paper_over"] = (
            fid / study.paper_baseline if isinstance(fid, float) and study.paper_baseline else fid
        )
    noise = noise_of(rows)
    claims = test_claims(study, {row["name"]: row for row in rows}, noise)
    columns = [
        {"key": key, "label": label}
        for key, label in _COLUMNS
        if key in _ALWAYS or any(row.get(key) is not None for row in rows)
    ]
    base = next((row for row in rows if row["recipe"]), None)
    data: dict[str, Any] = {
        "name": study.name,
        "title": study.title,
        "about": study.about,
        "columns": columns,
        "rows": rows,
        "noise": noise,
        "claims": claims,
        "findings": sentences(study, claims, noise),
        "recipe": base["recipe"] if base else None,
        "protocol": _protocol(setting, base),
        "command": _command(setting),
        "environment": environment(),
        "scatter": [
            {"x": key, "y": "distance"} for key in ("model_flops", "model_params", "share_of_pretraining")
        ],
    }
    if not study.claims and study.summarize is None:
        data["findings"] += _ranking(rows)
    for row in rows:
        del row["recipe"], row["teacher_depth"]
    if study.summarize is not None:
        more = study.summarize(rows)
        data |= {**more, "findings": [*data["findings"], *more.get("findings", [])]}
    weights.write_json(setting.folder / "study.json", data)
    return data


def _entry(setting: Setting, row: Row) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": row.name, "label": row.label, "samples": None, "distance": None, "status": None, "recipe": None,
        "depth": None, "teacher_depth": None,
        "unedited": row.teacher in ("as it is", "other noise"), "seed": setting.seed + row.seed,
        "paper_fid": row.paper.get("fid"), "paper": dict(row.paper), "group": _group(setting, row),
    }  # fmt: skip
    folder, file = setting.folder, setting.result_file(row.name)
    if not file.is_file():
        for kind, key in (("failures", "error"), ("unavailable", "why")):
            if (said := folder / kind / f"{row.name}.json").is_file():
                return entry | {
                    "status": str(weights.read_json(said, "row")[key]),
                    "failed": kind == "failures",
                }
        return entry | {"status": "not run"}
    found = weights.read_json(file, "result")
    cost = found.get("cost", {})
    changes = cost.get("rows", [])
    model = cost.get("model", {})
    entry |= {
        **found["metrics"],
        **{key: found.get(key) for key in ("flops", "seconds", "share_of_pretraining", "seed")},
        "distance": distance_of(found),
        "model_flops": model.get("flops_per_image", [None, None])[1],
        "model_params": model.get("params", [None, None])[1],
        "depth": model.get("depth", [None, None])[1],
        "teacher_depth": model.get("depth", [None, None])[0],
        "start_error": found.get("start_error"),
    }
    if len(changes) == 1:
        entry |= {key: changes[0][key] for key in ("flops_op_pct", "flops_ft_pct", "params_pct")}
    if found.get("diverged"):
        entry |= {"diverged": True, "status": f"diverged: {found['diverged']}"}
    if found.get("samples"):
        entry["samples"] = str(Path("rows") / row.name / found["samples"])
    known = folder / "shared" / "rows" / f"{row.name}.json"
    if known.is_file() and row.teacher is None:
        entry["recipe"] = weights.read_json(known, "row")
    return entry


def _group(setting: Setting, row: Row) -> str:
    """What rows have in common that differ in their share of layers, seed or learning rate alone: a plot joins them."""
    name = _VARIED.sub("", row.name)
    shared = sum(_VARIED.sub("", other.name) == name for other in setting.study.rows)
    return name if shared > 1 else ""


def _protocol(setting: Setting, base: dict[str, Any] | None) -> dict[str, Any]:
    if base is None:
        return {}
    recipe = base["recipe"]
    return {**recipe["sample"], "model": recipe["model"], "data": recipe["data"], "seed": setting.seed}


def _command(setting: Setting) -> str:
    changes = " ".join(f"--set {text}" for text in setting.overrides)
    return " ".join(
        f"graft study {setting.study.source or setting.study.name} {changes} --seed {setting.seed}".split()
    )


def _ranking(rows: list[dict[str, Any]]) -> list[str]:
    """For a study that claims nothing: every row's distance over its teacher's, best first."""
    ranked = sorted(
        (r for r in rows if not r["unedited"] and r["over_teacher"] is not None),
        key=lambda r: r["over_teacher"],
    )
    return [f"{row['label']}: {row['over_teacher']:.2f} times the teacher's distance." for row in ranked]

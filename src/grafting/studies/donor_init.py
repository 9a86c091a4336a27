"""Study `donor-init`: how far the donor's weights and a closed-form fit carry, per operator.

Every operator gets a layer of its own in one model, once from random and once from the donor; operators learn
independently, so the two runs compare them on equal inputs. The question per operator: the error at step 0, and after
how many steps the donor start is where the random start ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafting.console import Console
from grafting.formats import weights
from grafting.pipeline import Pipeline
from grafting.recipes import Recipe, load_recipe
from grafting.report.study import write_study
from grafting.runs import RunFolder, environment

NAME = "donor-init"
_LAYERS: tuple[tuple[str, int, Any], ...] = (
    ("mha", 1, "hyena_se"),
    ("mha", 3, "hyena_x"),
    ("mha", 5, "hyena_y"),
    ("mha", 7, "swa"),
    ("mha", 9, "mamba2"),
    ("mlp", 2, {"mlp": {"ratio": 3}}),
    ("mlp", 4, {"mlp": {"ratio": 6}}),
    ("mlp", 6, "mlp_hyena_x"),
)
_SETTINGS = [
    "distill.validate_every=10",
    "distill.early_stop=0",
    "distill.num_validation=128",
    "finetune=null",
]


def run_donor_init(
    folder: Path, console: Console, *, model: str | None, seed: int, device: str, changes: list[str] | None
) -> Path:
    """Both runs (each resumable), then study.json and study.html."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    starts: dict[str, dict[str, float]] = {}
    for init in ("random", "donor"):
        recipe = load_recipe(
            "demo", [*_SETTINGS, *(changes or []), f"seed={seed}", *([f"model={model}"] if model else [])]
        )
        plan = [
            {"replace": {"target": target, "layers": [layer], "with": operator, "init": init}}
            for target, layer, operator in _LAYERS
        ]
        recipe = recipe.model_copy(update={"plan": plan, "name": f"{NAME}-{init}"})
        path = folder / "rows" / init
        pipeline = Pipeline(recipe, RunFolder(path, console), device)
        pipeline.check()
        pipeline.run = RunFolder.create(path, recipe.to_dict(), console, resume=True)
        if pipeline.run.result("distill") is None:
            console.say(f"== {init} init")
            pipeline.distill()
        result = pipeline.run.result("distill") or {}
        starts |= result["start_error"]
        curves[init] = _curves(pipeline.run)
    data = _collect(curves, starts, recipe)
    weights.write_json(folder / "study.json", data)
    return write_study(folder, data)


def _curves(run: RunFolder) -> dict[str, dict[int, float]]:
    """Held-out error per operator and step."""
    found: dict[str, dict[int, float]] = {}
    for record in run.metrics():
        if record.get("event") == "validation":
            for path, error in record["error"].items():
                found.setdefault(path, {})[record["step"]] = error
    return found


def _collect(
    curves: dict[str, dict[str, dict[int, float]]], starts: dict[str, dict[str, float]], recipe: Recipe
) -> dict[str, Any]:
    rows = []
    for target, layer, operator in _LAYERS:
        path = f"blocks.{layer}.{'attn' if target == 'mha' else 'mlp'}"
        random, donor = curves["random"][path], curves["donor"][path]
        end = min(random.values())
        reached = (
            0 if starts["fitted"][path] <= end else next((s for s in sorted(donor) if donor[s] <= end), None)
        )
        name = operator if isinstance(operator, str) else f"mlp r={operator['mlp']['ratio']}"
        rows.append({
            "name": name, "label": f"{name} (layer {layer})", "samples": None,
            "random_0": starts["random"][path], "copied_0": starts["copied"][path], "fitted_0": starts["fitted"][path],
            "random_end": end, "donor_end": min(donor.values()), "steps_random": max(random), "steps_donor": reached,
        })  # fmt: skip
    columns = [
        ("random_0", "error at step 0, random"), ("copied_0", "copied"), ("fitted_0", "copied + ridge fit"),
        ("random_end", "random, best"), ("donor_end", "donor, best"), ("steps_random", "steps, random"),
        ("steps_donor", "steps of the donor start to random's best"),
    ]  # fmt: skip
    return {
        "name": NAME,
        "title": "Donor start against random start, per operator",
        "about": (
            "Relative error mean|student - teacher| / mean|teacher| on held-out data, one operator a layer of "
            f"{recipe.model}, same budget and data; the loss is L1 for attention, L2 for MLP."
        ),
        "columns": [{"key": key, "label": label} for key, label in columns],
        "rows": rows,
        "findings": [],
        "curves": json.loads(json.dumps(curves)),
        "distill": recipe.to_dict()["distill"],
        "environment": environment(),
        "scatter": None,
    }

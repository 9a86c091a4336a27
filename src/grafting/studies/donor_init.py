"""Study `donor-init`: how far the donor's weights and a closed-form fit carry, per operator.

Every operator gets a layer of its own in one model, once from random and once from the donor; operators learn
independently, so the two runs compare them on equal inputs. The question per operator: the error at step 0, and after
how many steps the donor start is where the random start ends.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grafting.console import Console
from grafting.errors import RunError
from grafting.families import family_of
from grafting.formats import weights
from grafting.pipeline import Pipeline
from grafting.recipes import Recipe, load_recipe, parse_overrides
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
_PLANNED = {(target, layer) for target, layer, _ in _LAYERS}


def run_donor_init(
    folder: Path, console: Console, *, model: str | None, seed: int, device: str, changes: list[str] | None
) -> Path:
    """Both runs (each resumable), then study.json and study.html.

    `--set seed=...` and seed are the same setting. Raises GraftError, before the first run where it can be known.
    """
    changes = [*(changes or []), *([f"model={model}"] if model else [])]
    recipes = {init: _recipe(init, changes, seed) for init in ("random", "donor")}
    paths: dict[tuple[str, int], str] = {}
    for init, recipe in recipes.items():
        pipeline = Pipeline(recipe, RunFolder(folder / "rows" / init, console), device)
        pipeline.check()
        sites = family_of(pipeline.teacher).sites(pipeline.teacher)
        paths = {(site.kind, site.layer): site.path for site in sites if (site.kind, site.layer) in _PLANNED}
    curves: dict[str, dict[str, dict[int, float]]] = {}
    starts: dict[str, dict[str, float]] = {}
    for init, recipe in recipes.items():
        path = folder / "rows" / init
        run = RunFolder.create(path, recipe.to_dict(), console, resume=True)
        if run.result("distill") is None:
            console.say(f"== {init} init")
            Pipeline(recipe, run, device).distill()
        result = run.result("distill") or {}
        starts |= result["start_error"]
        curves[init] = _curves(run)
    data = _collect(curves, starts, paths, recipes["donor"]) | {
        "command": _command(changes, recipes["donor"])
    }
    weights.write_json(folder / "study.json", data)
    return write_study(folder, data)


def _recipe(init: str, changes: Sequence[str], seed: int) -> Recipe:
    """The recipe of one run. Raises RunError for settings that this study can't have."""
    given = parse_overrides(changes)
    if "plan" in given:
        raise RunError(
            f"study {NAME!r} has a plan of its own, one operator a layer: leave out --set plan=..., or use graft run"
        )
    plan = [
        {"replace": {"target": target, "layers": [layer], "with": operator, "init": init}}
        for target, layer, operator in _LAYERS
    ]
    recipe = load_recipe("demo", [*_SETTINGS, f"seed={seed}", *changes])
    if seed not in (0, recipe.seed):
        raise RunError(f"study {NAME!r}: --seed {seed} and --set seed={recipe.seed} differ: give one of them")
    if recipe.finetune is not None:
        raise RunError(f"study {NAME!r} has no stage 2: leave out the settings of finetune")
    config = recipe.distill
    if config is None:
        raise RunError(
            f"study {NAME!r} compares runs of stage 1, which distill=null leaves out: drop that setting"
        )
    if not config.fit_readout:
        raise RunError(
            f"study {NAME!r} compares the fitted readouts with the copies, and distill.fit_readout=false leaves the "
            "fit out: give true"
        )
    if config.num_validation == 0:
        raise RunError(
            f"study {NAME!r} compares errors on held-out samples, and distill.num_validation=0 holds out none: give 1 "
            "or more"
        )
    return recipe.model_copy(update={"plan": plan, "name": f"{NAME}-{init}"})


def _command(changes: Sequence[str], recipe: Recipe) -> str:
    """How to run it again."""
    settings = [part for text in changes for part in ("--set", text)]
    return shlex.join(["graft", "study", NAME, *settings, "--seed", str(recipe.seed)])


def _curves(run: RunFolder) -> dict[str, dict[int, float]]:
    """Held-out error per operator and step."""
    found: dict[str, dict[int, float]] = {}
    for record in run.metrics():
        if record.get("event") == "validation":
            for path, error in record["error"].items():
                found.setdefault(path, {})[record["step"]] = error
    return found


def _collect(
    curves: Mapping[str, Mapping[str, Mapping[int, float]]], starts: Mapping[str, Mapping[str, float]],
    paths: Mapping[tuple[str, int], str], recipe: Recipe,
) -> dict[str, Any]:  # fmt: skip
    """The table. curves: init -> path -> step -> error; starts: kind of start -> path -> error at step 0."""
    rows = []
    for target, layer, operator in _LAYERS:
        path = paths[target, layer]
        random, donor = curves["random"][path], curves["donor"][path]
        end = min(random.values())
        reached = (
            0 if starts["fitted"][path] <= end else next((s for s in sorted(donor) if donor[s] <= end), None)
        )
        name = operator if isinstance(operator, str) else f"mlp r={operator['mlp']['ratio']}"
        rows.append({
            "name": name, "label": f"{name} (layer {layer})", "samples": None, "seed": recipe.seed,
            "random_0": starts["random"][path], "copied_0": starts["copied"][path], "fitted_0": starts["fitted"][path],
            "random_end": end, "donor_end": min(donor.values()), "steps_random": max(random), "steps_donor": reached,
        })  # fmt: skip
    columns = [
        ("random_0", "error at step 0, random"), ("copied_0", "copied"), ("fitted_0", "copied + ridge fit"),
        ("random_end", "random, best"), ("donor_end", "donor, best"), ("steps_random", "steps, random"),
        ("steps_donor", "steps of the donor start to random's best"),
    ]  # fmt: skip
    distill = recipe.to_dict()["distill"]
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
        "distill": distill,
        "protocol": {
            **{key: distill[key] for key in ("steps", "batch_size", "num_validation")},
            "model": recipe.model,
            "data": recipe.data,
            "seed": recipe.seed,
        },
        "environment": environment(),
        "scatter": None,
    }

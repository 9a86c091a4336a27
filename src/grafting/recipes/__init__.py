"""Recipes: a model, data, a plan, and the settings of every stage. A YAML file here states only what differs.

A preset is a set of defaults under the recipe: `grafting` (ours), `small` (the demo's protocol, for the paper's
experiments on dit-fashion), `paper` (the text of arXiv 2506.05340) and `paper-code` (the published code, where it
differs from the text). The paper's experiments are rows of one table (`table.py`): `graft run table4/mha-swa-50`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from grafting.errors import RunError
from grafting.recipes.equal_budget import EQUAL_BUDGET
from grafting.recipes.presets import PRESETS
from grafting.recipes.rows import merged, row_recipe
from grafting.recipes.settings import EvaluateConfig, Pretraining, Recipe, SampleConfig, SynthesizeConfig
from grafting.recipes.table import PAPER_STUDIES
from grafting.selectors import closest
from grafting.training.config import settings
from grafting.yaml_io import load_yaml

__all__ = [
    "EXPERIMENTS", "PRESETS", "EvaluateConfig", "Pretraining", "Recipe", "SampleConfig", "SynthesizeConfig",
    "experiments", "load_recipe", "packaged", "parse_overrides", "recipe_mapping",
]  # fmt: skip


EXPERIMENTS = {study.name: study for study in (*PAPER_STUDIES, EQUAL_BUDGET)}


def packaged() -> list[str]:
    """Names of the recipes that come as files with the package."""
    return sorted(
        Path(str(entry)).stem for entry in files("grafting.recipes").iterdir() if str(entry).endswith(".yaml")
    )


def experiments() -> dict[str, list[str]]:
    """Study -> names of its rows that are recipes too: `graft run STUDY/ROW`."""
    return {
        name: [row.name for row in study.rows if row.teacher is None and not row.best_of]
        for name, study in EXPERIMENTS.items()
    }


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by packaged name, STUDY/ROW, file or mapping, with `a.b=value` overrides (values in YAML).

    Raises RunError.
    """
    if isinstance(source, Mapping):
        data, where = copy.deepcopy(dict(source)), "recipe"  # overrides go into it
    elif (row := _experiment(str(source), overrides)) is not None:
        return row
    else:
        data, where = recipe_mapping(source), f"recipe {str(source)!r}"
    for text in overrides:
        _override(data, text)
    preset = data.get("preset", "grafting")
    if preset not in PRESETS:
        raise RunError(f"{where}: unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
    whole = merged(PRESETS[preset], data)
    if data.get("student") is not None and "distill" not in data:
        whole["distill"] = None  # a saved graft has had its stage 1, unless the recipe asks for one
    return settings(Recipe, whole, where)


def recipe_mapping(source: str | Path) -> dict[str, Any]:
    """The content of a recipe file or a packaged recipe, as it stands. Raises RunError."""
    path = Path(source)
    if str(source) in packaged():
        path = Path(str(files("grafting.recipes") / f"{source}.yaml"))
    elif not path.is_file():
        raise RunError(
            f"no recipe {str(source)!r}{closest(str(source), packaged())}: expected a file, one of "
            f"{', '.join(packaged())}, or STUDY/ROW with a study of {', '.join(EXPERIMENTS)} (see graft list)"
        )
    data = load_yaml(path, "recipe", RunError)
    if not isinstance(data, dict):
        raise RunError(f"recipe {str(source)!r}: expected a mapping with the keys model, data and plan")
    return data


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` texts as a nested mapping. Raises RunError."""
    data: dict[str, Any] = {}
    for text in overrides:
        _override(data, text)
    return data


def _experiment(source: str, overrides: Sequence[str]) -> Recipe | None:
    """A row of the paper's table as its study would run it, overrides apart; None for a source that names none."""
    name, slash, row = source.partition("/")
    if not slash or name not in EXPERIMENTS or Path(source).is_file():
        return None
    study = EXPERIMENTS[name]
    found = study.row(row)
    if found.teacher is not None or found.best_of:
        raise RunError(f"row {source!r} makes sense within its study only: graft study {name} --only {row}")
    return row_recipe(study, found, parse_overrides(overrides), alone=True)


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RunError(f"--set {text!r}: expected key=value or stage.key=value, such as distill.steps=500")
    target = data
    for part in parts[:-1]:
        below = target.get(part)
        if below is None:
            below = target[part] = {}
        if not isinstance(below, dict):
            raise RunError(f"--set {text!r}: {part!r} is not a mapping")
        target = below
    target[parts[-1]] = (
        load_yaml(value if value.strip() else "null", "--set", RunError) if "\n" in value else _scalar(value)
    )


def _scalar(value: str) -> Any:
    """A YAML value; the path heuristics of files are not for it."""
    wrapped = load_yaml(f"value: {value}\n", "--set", RunError)
    return wrapped["value"]

"""A study of one's own: a YAML file that names what its rows share, and each row by what it changes.

title: Which mixer for the last blocks
recipe: {model: dit-fashion, data: fashion-10, preset: small}     # or the name or file of a recipe
seeds: 3
rows:
  window: {plan: [{replace: {target: mha, layers: [8, 9, 10, 11], with: {swa: {window: 4}}}}]}
  mine: {label: my mixer, plan: [{replace: {target: mha, layers: [8, 9, 10, 11], with: my_mixer}}]}
claims:
- {text: My mixer is better than a window, better: [mine], worse: [window]}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from grafting.errors import RunError
from grafting.recipes.rows import Claim, Row, Study
from grafting.recipes.settings import Recipe
from grafting.recipes.table import NOISE_SEEDS
from grafting.selectors import closest
from grafting.training.config import Settings, settings
from grafting.yaml_io import load_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OF_ROWS = ("label", "seed")  # keys of a row that are none of a recipe


class _Claimed(Settings):
    text: str
    better: list[str] = Field(min_length=1)
    worse: list[str] = Field(min_length=1)


class _File(Settings):
    """The keys of a study's file."""

    rows: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    recipe: str | dict[str, Any] = Field(default_factory=dict)
    title: str | None = None
    about: str = ""
    seeds: Annotated[int, Field(ge=1)] = 1  # of training and noise; every row is run with each
    noise_seeds: Annotated[int, Field(ge=1)] = NOISE_SEEDS  # the teacher is sampled from that many
    claims: list[_Claimed] = Field(default_factory=list)


def load_study(path: str | Path) -> Study:
    """The study that a YAML file describes; its name is the file's. Raises RunError.

    The teacher is a row by itself, from `noise_seeds` seeds of noise: a difference counts beyond twice the deviation
    of its distance. With `seeds` a row is run that many times, as NAME-s0, NAME-s1, ...; a claim on it is on all.
    """
    path = Path(path)
    where = f"study {str(path)!r}"
    data = load_yaml(path, "study", RunError)
    if not isinstance(data, dict):
        raise RunError(f"{where}: expected a mapping with the keys rows and recipe")
    file = settings(_File, data, where)
    if not file.rows:
        raise RunError(f"{where}: a study needs rows: a mapping of names to what each changes in the recipe")
    names = {name: _seeded(name, file.seeds) for name in file.rows}
    rows = [row for name, body in file.rows.items() for row in _rows(where, name, body or {}, file.seeds)]
    noise = max(file.noise_seeds, file.seeds)
    teachers = [Row("teacher", "teacher", teacher="as it is")]
    teachers += [
        Row(f"teacher-noise-{n}", f"teacher, noise seed +{n}", teacher="other noise", seed=n)
        for n in range(1, noise)
    ]
    given = file.recipe
    return Study(
        name=path.stem, title=file.title or path.stem, about=file.about,
        recipe=given if isinstance(given, str) else "", base=None if isinstance(given, str) else given,
        rows=(*teachers, *rows), source=str(path),
        claims=tuple(
            Claim(c.text, (_named(where, c.better, names), _named(where, c.worse, names)), paper=False)
            for c in file.claims
        ),
    )  # fmt: skip


def _seeded(name: str, seeds: int) -> tuple[str, ...]:
    return (name,) if seeds == 1 else tuple(f"{name}-s{n}" for n in range(seeds))


def _rows(where: str, name: str, body: Mapping[str, Any], seeds: int) -> Iterable[Row]:
    if not _NAME.fullmatch(name):
        raise RunError(
            f"{where}: a row's name is a folder's: letters, digits, '.', '_' and '-', not {name!r}"
        )
    if name.startswith("teacher"):
        raise RunError(f"{where}: row {name!r}: rows of the teacher come by themselves; give another name")
    for key in body:
        if key not in (*Recipe.model_fields, *_OF_ROWS) or key in ("name", "about"):
            known = (*_OF_ROWS, *Recipe.model_fields)
            raise RunError(f"{where}: row {name!r}: unknown key {key!r}{closest(key, known)} (a row has label, "
                           "seed and the keys of a recipe)")  # fmt: skip
    first, label = body.get("seed", 0), body.get("label", name)
    if not isinstance(first, int) or isinstance(first, bool) or not isinstance(label, str):
        raise RunError(f"{where}: row {name!r}: seed is a whole number, added to --seed, and label a text")
    changes = {key: value for key, value in body.items() if key not in _OF_ROWS}
    for number, own in enumerate(_seeded(name, seeds)):
        said = label if seeds == 1 else f"{label}, seed +{first + number}"
        yield Row(own, said, changes, seed=first + number, rank=1 + number)


def _named(where: str, wanted: list[str], names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The rows of the study that a claim's rows are."""
    for name in wanted:
        if name not in names:
            raise RunError(f"{where}: a claim names {name!r}, which is no row{closest(name, list(names))}")
    return tuple(own for name in wanted for own in names[name])


__all__ = ["load_study"]

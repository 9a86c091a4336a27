"""A study is a table: rows that differ in a few settings, the paper's figures, and what is claimed of them.

`row_recipe` makes a row a recipe. Defaults, from the bottom: the preset; the testbed or the recipe of the study;
what the user set; the row. Of a row that runs alone the user's word is the last; in a study, where rows differ in
just what they state, `check_stated` refuses a word against it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grafting.errors import RunError
from grafting.recipes.presets import FIVE_LAYERS, PRESETS, REAL_SIZE, SHARES, TESTBEDS
from grafting.recipes.settings import Recipe
from grafting.selectors import closest
from grafting.training.config import settings

STANDARD_SHARE = 0.1  # of the training set: what the paper finetunes on where it says nothing else


class UnavailableError(RunError):
    """A row that can't be run with what was given: it needs other data or a locality file. It has not failed."""


@dataclass(frozen=True)
class Row:
    """One row of a study.

    changes: what it changes in the study's recipe, mapping by mapping. teacher: the row is the teacher: "as it is",
    "other noise" or "finetuned". paper: the paper's figures (`fid`, `is`, ...; "x" for a FID above 50). share: how
    much of the training set it sees. times: {"stage.key": factor} on settings. seed: added to the study's. rank: rows
    of a lower one run first. best_of: names of rows; this row is the best of them, with its own seed and `changes`.
    """

    name: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    paper: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    rank: int = 0
    best_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A finding to be tested: every row of a group has a lower distance than every row of the next.

    over: instead, every row of the one group has more than this many times the teacher's distance.
    """

    text: str
    groups: tuple[tuple[str, ...], ...]
    over: float | None = None
    paper: bool = True  # a finding of the paper; False: a claim of our own


@dataclass(frozen=True)
class Study:
    """Rows over one base: a recipe by name or file, the content of one, or (neither) a testbed chosen by the preset.

    source: the file that describes it, which `graft study` takes in place of a name.
    """

    name: str
    title: str
    about: str
    recipe: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    paper_baseline: float | None = None
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None  # more for study.json
    base: Mapping[str, Any] | None = None
    source: str = ""

    @property
    def on_testbed(self) -> bool:
        """Whether a preset chooses model and data."""
        return not self.recipe and self.base is None

    def row(self, name: str) -> Row:
        """The row of this name. Raises RunError."""
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise RunError(
            f"study {self.name!r} has no row {name!r}{closest(name, names)}; it has {', '.join(names)}"
        )


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; `objectives` is replaced as a whole."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        deep = isinstance(value, Mapping) and isinstance(below, Mapping) and key != "objectives"
        result[key] = merged(below, value) if deep else value  # type: ignore[arg-type]
    return result


def testbed_of(given: Mapping[str, Any]) -> str:
    """Which testbed a preset and a model mean."""
    real = given.get("preset", "small") in REAL_SIZE and given.get("model") != "dit-fashion"
    return "imagenet" if real else "fashion"


def row_recipe(
    study: Study, row: Row, given: Mapping[str, Any], base: Mapping[str, Any] | None = None, seed: int | None = None,
    alone: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe of a row.

    given: what the user set, as a nested mapping. base: content of the study's packaged recipe, if it has one.
    alone: the row runs outside its study, so that what the user set goes over the row too.
    Raises UnavailableError (the row needs other data), RunError.
    """
    testbed = testbed_of(given)
    if base is None:
        base = {"preset": given.get("preset", "small"), **TESTBEDS[testbed]}
    data = merged(merged(base, given), merged(row.changes, given) if alone else row.changes)
    data |= {stage: None for stage in ("distill", "finetune") if stage in given and given[stage] is None}
    preset = data.get("preset", "grafting")
    if preset not in PRESETS:
        raise RunError(
            f"study {study.name!r}: unknown preset {preset!r}: expected one of {', '.join(PRESETS)}"
        )
    data = copy.deepcopy(merged(PRESETS[preset], data))
    if study.on_testbed:
        _set_share(row, data, given, alone)
    for entry in data.get("plan") or []:
        body = entry.get("replace", {})
        if body.get("layers") == "five":
            body["layers"] = FIVE_LAYERS[testbed]
    if row.teacher is not None:
        data.setdefault("plan", _SOME_PLAN)
    data |= {"name": row.name, "about": row.label, "seed": (seed or data.get("seed") or 0) + row.seed}
    if alone:
        data |= {key: given[key] for key in ("name", "about") if key in given}
    recipe = settings(Recipe, data, f"study {study.name!r}, row {row.name!r}")
    return _times(recipe, row.times) if row.times else recipe


def check_stated(study: Study, rows: Sequence[Row], given: Mapping[str, Any]) -> None:
    """Refuse what the user set against what one of these rows states: the rows differ in just that. Raises RunError.

    A stage that a row leaves out has no settings to differ in, and a stage that the user leaves out no row has.
    """
    for row in rows:
        for source in (row, *(study.row(name) for name in row.best_of)):
            for key, (mine, theirs) in _against(given, _stated(study, source)).items():
                raise RunError(
                    f"study {study.name!r}: {key}={_short(mine)} is given and row {row.name!r} states "
                    f"{_short(theirs)}, which is what it is compared by: leave {key} out, or leave the row out "
                    "with --only"
                )


def _stated(study: Study, row: Row) -> dict[str, Any]:
    """What a row sets in a recipe."""
    part = _share_of_stage_2(row)
    if not study.on_testbed or part == 1.0 or row.changes.get("finetune", {}) is None:
        return dict(row.changes)
    return merged(row.changes, {"finetune": {"fraction": part}})


def _against(
    given: Mapping[str, Any], stated: Mapping[str, Any], above: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Key -> (given, stated) where both say something and not the same; parts of a stage by `stage.key`."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in given.keys() & stated.keys():
        mine, theirs = given[key], stated[key]
        stages = isinstance(mine, Mapping), isinstance(theirs, Mapping)
        if all(stages) and key != "objectives":
            found |= _against(mine, theirs, f"{above}{key}.")
        elif mine != theirs and not (any(stages) and (mine is None or theirs is None)):
            found[above + key] = mine, theirs
    return dict(sorted(found.items()))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_SOME_PLAN = [{"replace": {"target": "mha", "layers": "all", "with": "mha"}}]  # of a row that edits nothing


def _share_of_stage_2(row: Row) -> float:
    """Which fraction of the study's data stage 2 of a row sees."""
    share = row.share or STANDARD_SHARE
    return share / max(share, STANDARD_SHARE)


def _set_share(row: Row, data: dict[str, Any], given: Mapping[str, Any], alone: bool) -> None:
    """Which fraction of the data both stages see, and which of that stage 2 sees."""
    base = max(row.share or STANDARD_SHARE, STANDARD_SHARE)
    if "fraction" in given and base > STANDARD_SHARE:
        raise UnavailableError(
            f"row {row.name!r} needs {base:.0%} of the training set, and a given fraction makes the data the "
            f"{STANDARD_SHARE:.0%} of the other rows: give the whole and leave fraction out"
        )
    if "fraction" not in given:
        held = SHARES.get(str(data.get("data")), 1.0)
        if base > held * (1 + 1e-9):
            raise UnavailableError(
                f"row {row.name!r} needs {base:.0%} of the training set; data {data.get('data')!r} holds {held:.0%} "
                "of it: give the whole, such as --data fashion:FOLDER"
            )
        data["fraction"] = base / held
    part, theirs = _share_of_stage_2(row), given.get("finetune") or {}
    if part < 1.0 and data.get("finetune", {}) is not None and not (alone and "fraction" in theirs):
        data["finetune"] = {**data.get("finetune", {}), "fraction": part}


def _times(recipe: Recipe, factors: Mapping[str, float]) -> Recipe:
    data = recipe.to_dict()
    for place, factor in factors.items():
        stage, _, key = place.partition(".")
        if data.get(stage) is not None:
            data[stage][key] = type(data[stage][key])(round(data[stage][key] * factor, 12))
    return settings(Recipe, data, f"row {recipe.name!r}")

"""What a row is: all that its result depends on, kept beside the study so that nothing else is taken for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grafting.errors import RunError
from grafting.formats import weights
from grafting.plan import GraftPlan
from grafting.recipes.rows import Row
from grafting.recipes.settings import FREE_KEYS, Recipe, upgraded
from grafting.runs.folder import VERSION

NOT_OF_THE_RESULT = ("name", "about", "preset", "trackers")


def identity_of(row: Row, recipe: Recipe) -> dict[str, Any]:
    """What a row's result depends on, names apart; of a locality file its content, wherever it lies."""
    found = {k: v for k, v in bound(recipe.to_dict()).items() if k not in NOT_OF_THE_RESULT}
    found["version"] = VERSION
    if recipe.pipeline is None:  # as the rows of a time before there was one
        del found["pipeline"]
    if recipe.locality is not None and Path(recipe.locality).is_file():
        found["locality"] = hashlib.sha256(Path(recipe.locality).read_bytes()).hexdigest()
    if row.teacher in ("as it is", "other noise"):
        found = {
            k: found[k] for k in ("model", "num_heads", "dtype", "seed", "sample", "evaluate", "version")
        }
        return {"teacher": True, **found}
    return {"teacher": row.teacher == "finetuned", **_one_form(found)}


def _one_form(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the plan in its plan-file form, which is one for equal plans; `init` is in the plan."""
    found = dict(identity)
    if found.get("plan"):
        found["plan"] = GraftPlan.from_dict(found["plan"]).to_dict()["entries"]
        found.pop("init", None)
    return found


def bound(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what changes its result by rounding at most."""
    return {
        stage: {key: value for key, value in said.items() if f"{stage}.{key}" not in FREE_KEYS}
        if isinstance(said, Mapping)
        else said
        for stage, said in recipe.items()
    }


def _identity_file(path: Path, name: str) -> Path:
    return path.parent.parent / "shared" / "rows" / f"{name}.json"


def record_identity(path: Path, identity: Mapping[str, Any], name: str) -> None:
    """Keep what a row is: it begins now."""
    if not (file := _identity_file(path, name)).is_file():
        weights.write_json(file, dict(identity))


def check_identity(path: Path, identity: Mapping[str, Any], name: str) -> None:
    """Refuse to go on with a begun row, or to put others beside it, with other settings. Raises RunError."""
    file = _identity_file(path, name)
    if not file.is_file():
        return
    known = read_identity(file)
    now = json.loads(json.dumps(identity))
    differing = sorted(key for key in {*known, *now} if known.get(key) != now.get(key))
    if differing:
        raise RunError(
            f"row {name!r} was begun with other settings (different: {', '.join(differing)}); "
            "give another --out, or remove the row's folder and its file in shared/rows"
        )


def read_identity(file: Path) -> dict[str, Any]:
    known = weights.read_json(file, "row")
    version = known.get("version")
    known = upgraded(known, version if isinstance(version, int) else 1)
    return _one_form(bound(known)) | {"version": VERSION}


def taken_from(folders: Sequence[Path], identity: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The first of other studies' folders that has the result of the same row, and the row's name there."""
    now = json.loads(json.dumps(identity))
    for folder in folders:
        for file in sorted((folder / "shared" / "rows").glob("*.json")):
            if (folder / "rows" / file.stem / "result.json").is_file() and read_identity(file) == now:
                return folder, file.stem
    return None

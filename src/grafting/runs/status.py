"""status.json: where a run stands, for `graft status`. A few times a minute at most; never a reason to stop a run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grafting.errors import GraftError, RunError
from grafting.formats import weights
from grafting.runs import checkpoints
from grafting.runs.lock import NAME as LOCK
from grafting.runs.lock import is_alive, read_owner, utc_now
from grafting.runs.metrics import MetricsLog
from grafting.yaml_io import load_yaml

NAME = "status.json"
STAGES = ("synthesize", "graft", "distill", "finetune", "sample", "evaluate")
_SECONDS = 5.0  # between two writings while a stage goes on
_OPTIONAL = ("synthesize", "distill", "finetune", "evaluate")


class StatusFile:
    """The file, written whole or not at all; errors of the disk are left to what matters more."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.fields: dict[str, Any] = {}
        self._written = float("-inf")
        self._first: tuple[int, float] = (0, 0.0)  # step and time at which this process took up the stage

    def start(self) -> None:
        """A process takes up the run."""
        self.fields = {
            "state": "running",
            "started": utc_now(),
            "pid": os.getpid(),
            "stage": None,
            "error": None,
        }
        self._write()

    def begin(self, stage: str, step: int = 0) -> None:
        """A stage begins, or goes on from `step`."""
        total = self.fields.get("total") if self.fields.get("stage") == stage else None
        self.fields |= {"stage": stage, "step": step, "total": total, "eta_seconds": None, "text": ""}
        self._first = (step, time.monotonic())
        self._write()

    def progress(self, stage: str, step: int, total: int, text: str) -> None:
        """`step` of `total` are done."""
        if not self.fields:
            return
        if self.fields.get("stage") != stage:
            self.begin(stage)
        done, since = step - self._first[0], time.monotonic() - self._first[1]
        eta = round(since / done * (total - step), 1) if done > 0 else None
        self.fields |= {"step": step, "total": total, "eta_seconds": eta, "text": text}
        if time.monotonic() - self._written >= _SECONDS:
            self._write()

    def end(self, state: str, error: str | None = None) -> None:
        """The process leaves the run: `done`, `stopped` (it was asked to) or `failed`."""
        self.fields |= {"state": state, "error": error}
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        content = json.dumps(self.fields | {"updated": utc_now()}) + "\n"
        partial = self.path.with_name(f".{NAME}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        with contextlib.suppress(OSError):
            with os.fdopen(os.open(partial, flags, 0o644), "w", encoding="utf-8") as file:
                file.write(content)
            os.replace(partial, self.path)


def run_status(folder: str | Path) -> dict[str, Any]:
    """Where the run in `folder` stands, in JSON types. Raises RunError where there is no run.

    state: `running`; `finished` (every stage of its recipe); `failed` (with its error); `stopped` (on request);
    `dead` (its process is gone without a word); `idle` (nothing is wrong, and nothing is running).
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise RunError(f"{str(folder)!r} is not a run folder: it has no run.json")
    done = _stages_done(folder)
    left = [stage for stage in _wanted(folder) if stage not in done]
    found, owner = _read(folder / NAME), read_owner(folder)
    alive = owner is not None and is_alive(owner, folder / LOCK)
    stage = found.get("stage") if alive or left else None
    if stage is None and left:
        stage = left[0]
    newest = checkpoints.newest_step(folder / "checkpoints" / str(stage))
    current = found.get("stage") == stage
    return {
        "run": str(folder),
        "state": _state(found.get("state"), alive, owner is not None, not left),
        "stage": stage,
        "step": found.get("step") if current and stage else newest,
        "steps": found.get("total") if current and stage else None,
        "eta_seconds": found.get("eta_seconds") if alive else None,
        "losses": _losses(folder),
        "error": found.get("error"),
        "stages_done": done,
        "stages_left": left,
        "checkpoint": newest,
        "process": {"pid": owner.pid, "host": _printable(owner.host), "since": _printable(owner.since)}
        if owner
        else None,
        "updated": found.get("updated"),
    }


def _state(recorded: Any, alive: bool, locked: bool, complete: bool) -> str:
    if alive:
        return "running"
    if recorded == "failed":
        return "failed"
    if complete:
        return "finished"
    if locked or recorded == "running":
        return "dead"
    return "stopped" if recorded == "stopped" else "idle"


def _read(path: Path) -> dict[str, Any]:
    """What the file says; fields of another kind than they should have are left out."""
    kinds: dict[str, tuple[type, ...]] = {
        "state": (str,), "stage": (str,), "step": (int,), "total": (int,), "eta_seconds": (int, float),
        "error": (str,), "updated": (str,),
    }  # fmt: skip
    try:
        found = weights.read_json(path, "status")
    except GraftError:
        return {}
    kept = {key: found[key] for key, kind in kinds.items() if isinstance(found.get(key), kind)}
    return {key: _printable(value) if isinstance(value, str) else value for key, value in kept.items()}


def _printable(text: str) -> str:
    """One line without control characters: it is shown on a terminal."""
    return "".join(char if char.isprintable() else " " for char in text[:1000])


def _stages_done(folder: Path) -> list[str]:
    try:
        stages = weights.read_json(folder / "run.json", "run").get("stages")
    except GraftError as error:
        raise RunError(str(error)) from None
    return [str(stage) for stage in stages] if isinstance(stages, Mapping) else []


def _wanted(folder: Path) -> list[str]:
    recipe = load_yaml(folder / "recipe.yaml", "recipe", RunError)
    if not isinstance(recipe, Mapping):
        raise RunError(f"{folder / 'recipe.yaml'} is not a recipe")
    default = {"synthesize": None}
    return [s for s in STAGES if s not in _OPTIONAL or recipe.get(s, default.get(s, {})) is not None]


def _losses(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each training stage, the step and value of the last training and the last held-out loss or error."""
    found: dict[str, dict[str, Any]] = {}
    for record in MetricsLog(folder / "metrics.jsonl", lambda stage: None).read():
        kind = {"None": "training", "validation": "held_out"}.get(str(record.get("event")))
        value = record.get("loss", record.get("error"))
        if kind and isinstance(record.get("stage"), str):
            found.setdefault(record["stage"], {})[kind] = {"step": record.get("step"), "value": _mean(value)}
    return found


def _mean(value: Any) -> float | None:
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None

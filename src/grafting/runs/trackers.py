"""Experiment trackers (tensorboard, wandb, trackio) through accelerate's classes: a copy of what metrics.jsonl gets.

Off unless the recipe names some. They are never a reason to end a run: one that fails is named once and left out.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grafting import processes
from grafting.errors import CheckpointError, RunError
from grafting.formats import weights

NAMES = ("tensorboard", "wandb", "trackio")
PROJECT = "grafting"
FILE = "trackers.json"  # the name under which a run that is resumed goes on in the tracker


def check_trackers(names: Sequence[str]) -> None:
    """Raise RunError for a tracker that is unknown or not installed; imports none of them."""
    for name in names:
        if name not in NAMES:
            raise RunError(f"trackers: unknown tracker {name!r}: expected some of {', '.join(NAMES)}")
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        if name not in LOGGER_TYPE_TO_CLASS or name not in [str(found) for found in get_available_trackers()]:
            raise RunError(
                f"trackers: {name} is not installed (or this accelerate is too old for it); "
                f"pip install {name}, or leave it out"
            )


class Trackers:
    """The trackers of a run, opened at its first record. For the process that writes alone.

    names: of `NAMES`. offsets: stage -> steps of the stages before it: trackers want steps that do not go back.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, recipe: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.names, self.folder, self.recipe, self.say = names, folder, recipe, say
        self._open: dict[str, Any] | None = None
        self._offset = {"finetune": _steps(recipe.get("distill"))}

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the numbers of one line of metrics.jsonl, named `stage/loss/path`."""
        if self._open is None:
            self._open = {}
            for name in self.names:
                self._attempt(name, self._start)
        stage, step = str(record.get("stage")), record.get("step")
        where = (stage, str(record["event"])) if record.get("event") else (stage,)
        values = _numbers({k: v for k, v in record.items() if k not in ("stage", "step", "event")}, where)
        if not values or not isinstance(step, int):
            return
        for name in list(self._open):
            self._attempt(
                name,
                lambda name: self._open[name].log(values, step=self._offset.get(stage, 0) + step),  # type: ignore[index]
            )

    def close(self) -> None:
        """Finish all of them; the next record opens them again."""
        for name in list(self._open or {}):
            self._attempt(name, lambda name: self._open[name].finish())  # type: ignore[index]
        self._open = None

    def _start(self, name: str) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # The process that writes is the only one that makes a tracker; told of others, accelerate would change the
        # number of its threads, and with it how sums are rounded.
        with processes.alone():
            PartialState(cpu=True)  # accelerate's log wants one; this package places its models itself
        kind = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, dict[str, Any]] = {
            "wandb": {"id": self._identity(), "resume": "allow", "dir": str(self.folder)},
            "trackio": {"name": f"{self.folder.name}-{self._identity()}", "resume": "allow"},
        }
        if name == "wandb":
            options[name]["name"] = str(self.recipe.get("name"))
        place = (name, str(self.folder)) if kind.requires_logging_directory else (PROJECT,)
        tracker = kind(*place, **options.get(name, {}))
        if hasattr(tracker, "start"):  # earlier versions start when they are made
            tracker.start()
        assert self._open is not None
        self._open[name] = tracker
        if name != "tensorboard":  # which would begin another log for them at every resume
            tracker.store_init_configuration({"recipe": json.dumps(self.recipe)} | _numbers(self.recipe, ()))

    def _identity(self) -> str:
        path = self.folder / FILE
        try:
            known = weights.read_json(path, "trackers").get("id")
        except CheckpointError:
            known = None
        if not isinstance(known, str) or not known.isalnum():
            known = secrets.token_hex(6)
            weights.write_json(path, {"id": known})
        return known

    def _attempt(self, name: str, work: Callable[[str], None]) -> None:
        """Do it, and leave a tracker out that can't."""
        try:
            work(name)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.say(f"warning: tracker {name} failed and is left out, the run goes on: {reason}")
            if self._open:
                self._open.pop(name, None)


def _steps(stage: Any) -> int:
    steps = stage.get("steps") if isinstance(stage, Mapping) else None
    return steps if isinstance(steps, int) else 0


def _numbers(values: Any, where: tuple[str, ...]) -> dict[str, float]:
    """The finite numbers of nested mappings, by their path."""
    if isinstance(values, Mapping):
        found: dict[str, float] = {}
        for key, value in values.items():
            found |= _numbers(value, (*where, str(key)))
        return found
    if isinstance(values, (int, float)) and not isinstance(values, bool) and math.isfinite(values):
        return {"/".join(where): values}
    return {}

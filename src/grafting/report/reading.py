"""What a run folder holds, read without trusting it: what is missing or damaged is empty here, and remarked on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafting.errors import GraftError, RunError
from grafting.report.format import mapping, sequence

STAGES = ("synthesize", "graft", "distill", "finetune", "sample", "evaluate")
_MAX_BYTES = 1 << 26
_MAX_LINES = 200_000


@dataclass(frozen=True)
class RunRecord:
    """The files of one run. `problems`: one sentence for each file that could not be read."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    state: Mapping[str, Any]
    metrics: list[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def stage(self, name: str) -> Mapping[str, Any]:
        """What a finished stage recorded; empty if it is not done."""
        return mapping(mapping(self.state.get("stages")).get(name))

    def records(self, stage: str, event: str | None = None) -> list[Mapping[str, Any]]:
        """The lines of metrics.jsonl of a stage, those of an event, or (None) the plain steps."""
        return [r for r in self.metrics if r.get("stage") == stage and r.get("event") == event]

    @property
    def edits(self) -> list[Mapping[str, Any]]:
        """The edits that the graft stage recorded."""
        return [edit for edit in sequence(self.stage("graft").get("edits")) if isinstance(edit, Mapping)]

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return _text(self.recipe.get("name")) or self.folder.resolve().name or "run"

    @property
    def model(self) -> str:
        """The recipe's model."""
        return _text(self.recipe.get("model")) or "the model"

    def settings(self, stage: str) -> Mapping[str, Any]:
        """The recipe's settings of a stage."""
        return mapping(self.recipe.get(stage))


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder. Raises RunError where there is none; files inside it may be missing or damaged."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("run.json", "recipe.yaml")):
        raise RunError(
            f"{str(folder)!r} is not a run folder: it has neither run.json nor recipe.yaml; make one with `graft run`"
        )
    problems: list[str] = []

    def read(name: str, parse: Callable[[str], Any], empty: Any) -> Any:
        path = folder / name
        if not path.exists():
            return empty
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError("it is too large")
            return parse(path.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError, RecursionError, GraftError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problems.append(f"{name} could not be read: {reason}")
            return empty

    recipe_text = read("recipe.yaml", str, "")
    return RunRecord(
        folder=folder,
        recipe=mapping(read("recipe.yaml", _yaml, {})),
        recipe_text=recipe_text,
        state=mapping(read("run.json", json.loads, {})),
        metrics=read("metrics.jsonl", _lines, []),
        evaluation=mapping(read("evaluation.json", json.loads, {})),
        problems=problems,
    )


def _yaml(text: str) -> Any:
    from grafting.yaml_io import load_yaml

    return load_yaml(text if "\n" in text else text + "\n", "recipe", RunError)


def _lines(text: str) -> list[Mapping[str, Any]]:
    found = []
    for line in text.splitlines()[:_MAX_LINES]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a torn line: the run was stopped while it wrote
        if isinstance(record, Mapping):
            found.append(record)
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""

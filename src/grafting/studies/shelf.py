"""Distilled operators by content, so that no two rows distill the same one.

In stage 1 operators learn independently: each from the teacher's activations at its own site, with its own loss,
clipping and rest, from draws that depend on the seed and the step alone. So an operator is the same whichever others
learn beside it, and a row of 75 % of the layers takes over the operators of the row of 50 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from grafting.formats import weights
from grafting.plain import canonical_json
from grafting.plan import GraftPlan
from grafting.surgery import Edit
from grafting.training.config import DEFAULT_LOSSES, DistillConfig

_NOT_OF_THE_RESULT = {"checkpoint_every", "keep_checkpoints", "log_every", "losses"}


@dataclass(frozen=True)
class Shelved:
    """A distilled operator: its state dict, and what stage 1 said of it."""

    state: Mapping[str, Tensor]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Shelf:
    """A folder of distilled operators; `others` are read too, never written."""

    folder: Path
    others: tuple[Path, ...] = ()

    def has(self, key: str) -> bool:
        """Whether this operator was distilled before."""
        return self._place(key) is not None

    def get(self, key: str) -> Shelved | None:
        """A distilled operator, or None."""
        place = self._place(key)
        if place is None:
            return None
        record = weights.read_json(place / f"{key}.json", "distilled operator")
        return Shelved(weights.read_safetensors(place / f"{key}.safetensors"), record)

    def put(self, key: str, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a distilled operator. The record is written last: where it is, the weights are."""
        weights.write_safetensors(self.folder / f"{key}.safetensors", dict(state))
        weights.write_json(self.folder / f"{key}.json", dict(record))

    def _place(self, key: str) -> Path | None:
        return next((p for p in (self.folder, *self.others) if (p / f"{key}.json").is_file()), None)


def operator_keys(
    edits: Iterable[Edit], config: DistillConfig, seed: int, known: Mapping[str, Any]
) -> dict[str, str] | None:
    """path -> key of every operator that stage 1 trains; None where the recipe leaves the loss to a measurement.

    The key is a hash of all that the result depends on. known: `circumstances` of the teacher and its data.
    """
    common = _common(config, seed, known)
    losses = {str(target): str(loss) for target, loss in (DEFAULT_LOSSES | config.losses).items()}
    found = {}
    for edit in edits:
        entry = edit.entry
        if not entry.train:
            continue
        loss = entry.loss or losses.get(entry.target, "l1")
        if loss == "auto":
            return None
        described = {
            "path": edit.site.path,
            "entry": replace(entry, layers=(edit.site.layer,), loss=loss).to_dict()["replace"],
        }
        found[edit.site.path] = hashlib.sha256(canonical_json({**common, **described}).encode()).hexdigest()
    return found


def plan_key(plan: GraftPlan, config: DistillConfig, seed: int, known: Mapping[str, Any]) -> str:
    """The key of the student that stage 1 makes of a whole plan, for plans whose parts are not independent."""
    described = {"edits": plan.to_dict(), "losses": dict(DEFAULT_LOSSES | config.losses)}
    return hashlib.sha256(canonical_json({**_common(config, seed, known), **described}).encode()).hexdigest()


def _common(config: DistillConfig, seed: int, known: Mapping[str, Any]) -> dict[str, Any]:
    """What every result of stage 1 depends on."""
    kept = {k: v for k, v in config.model_dump(mode="json").items() if k not in _NOT_OF_THE_RESULT}
    return {**known, "distill": kept, "seed": seed}

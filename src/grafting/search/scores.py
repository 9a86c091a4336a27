"""Damages on disk: a search that was stopped goes on where it was, and another aim measures no candidate again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grafting.errors import CheckpointError
from grafting.formats import weights
from grafting.formats.graft_folder import MANIFEST
from grafting.training.compute import Compute

NAME = "damage.json"
VERSION = 1  # of what damage is: another one is measured again


class Scores:
    """The damage of one candidate at each of its sites, by path, in `damage.json` of its run folder.

    measure: what it is measured with; damages of another measure, or of other weights, are measured again.
    Of several processes the first reads and writes, and all know the same.
    """

    def __init__(self, folder: Path, measure: Mapping[str, Any], compute: Compute) -> None:
        self.path, self.writer = folder / NAME, compute.is_main
        graft = hashlib.sha256((folder / "graft" / MANIFEST).read_bytes()).hexdigest()
        self.measure = {"version": VERSION, "graft": graft, **measure}
        self.known: dict[str, float] = compute.from_main(self._read() if compute.is_main else {})

    def keep(self, path: str, damage: float) -> None:
        """Remember the damage at a site, on disk at once."""
        self.known[path] = damage
        if self.writer:
            weights.write_json(self.path, {"measure": self.measure, "damages": self.known})

    def _read(self) -> dict[str, float]:
        """What the file knows of this measure; nothing where it is damaged, for it can be had again."""
        try:
            found = weights.read_json(self.path, "damage") if self.path.is_file() else {}
        except CheckpointError:
            return {}
        damages = found.get("damages")
        if found.get("measure") != self.measure or not isinstance(damages, dict):
            return {}
        return {
            path: value
            for path, value in damages.items()
            if isinstance(value, float) and math.isfinite(value)
        }


__all__ = ["Scores"]

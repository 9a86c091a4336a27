"""What the teacher predicts in stage 2, kept on disk for the next student that asks the same.

Batches are a function of seed, data and settings, so students that are finetuned alike, such as the rows of a study,
put the same questions to the same teacher. Whoever asks first writes the answer down, a file for each pass; the others
read it: the same values to the bit, without the teacher's pass.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafting.data import DataSource
from grafting.errors import CheckpointError
from grafting.families import family_of
from grafting.formats import weights
from grafting.plain import canonical_json
from grafting.training.compute import Compute
from grafting.training.config import FinetuneConfig

MOST_BYTES = 20 * 10**9  # of one teacher's answers; where they would take more, nothing is kept
SHARE = 0.5  # of the free disk, likewise


def answers_of(
    folder: str | Path, teacher: nn.Module, data: DataSource, config: FinetuneConfig, compute: Compute
) -> Answers | None:
    """The answers of `teacher` by all that they depend on; None for what asks it otherwise, or in several processes."""
    from grafting import __version__

    if compute.world > 1 or config.objectives.get("features") or not config.objectives.get("output"):
        return None
    how = ("batch_size", "compile", "fraction", "label_dropout", "num_validation", "seed", "timesteps")
    described = {
        "package": __version__, "torch": torch.__version__, "device": compute.device.type,
        "precision": compute.precision, "teacher": weights.combined_digest(weights.digests(teacher)),
        "architecture": family_of(teacher).architecture(teacher), "data": data.content_hash,
        "settings": config.model_dump(mode="json", include=set(how)),
    }  # fmt: skip
    return Answers(folder, described, config.steps * config.batch_size)


class Answers:
    """A folder of predictions. described: all that they depend on, in JSON types; visits: how many there will be."""

    def __init__(self, folder: str | Path, described: Mapping[str, Any], visits: int) -> None:
        self.folder = Path(folder) / hashlib.sha256(canonical_json(described).encode()).hexdigest()[:16]
        self.visits = visits
        self._keeps: bool | None = None  # None: not known before the first answer

    def at(self, index: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        """The prediction [B, ...] for consecutive global sample numbers [B]; `ask` makes it, if it is not there."""
        path = self.folder / f"{int(index[0])}-{len(index)}.safetensors"
        if path.is_file():
            with suppress(CheckpointError):  # a damaged one is asked for again
                return weights.read_safetensors(path)["prediction"]
        answer = ask()
        if self._keeps is None:
            self._keeps = self._fits(answer.nbytes // len(index) * self.visits)
        if self._keeps:
            try:
                weights.write_safetensors(path, {"prediction": answer})
            except CheckpointError:  # a disk that is full is no reason to stop
                self._keeps = False
        return answer

    def _fits(self, size: int) -> bool:
        place = next((folder for folder in self.folder.parents if folder.is_dir()), None)
        free = math.inf if place is None else shutil.disk_usage(place).free
        return size <= min(MOST_BYTES, SHARE * free)

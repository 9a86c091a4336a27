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

from torch import Tensor, nn

from grafting.data import DataSource
from grafting.errors import CheckpointError
from grafting.formats import weights
from grafting.plain import canonical_json
from grafting.training.circumstances import circumstances
from grafting.training.compute import Compute
from grafting.training.config import FinetuneConfig

MOST_BYTES = 20 * 10**9  # of all answers in a folder; what would take more is not kept
SHARE = 0.5  # of the free disk that the answers to one question may take

# Of a batch's way into the teacher.
_QUESTION = ("batch_size", "compile", "fraction", "label_dropout", "num_validation", "seed", "timesteps")


def question(config: FinetuneConfig) -> dict[str, Any] | None:
    """The settings that say what a student of one seed asks; None where it does not ask for predictions alone."""
    if config.objectives.get("features") or not config.objectives.get("output"):
        return None
    return config.model_dump(mode="json", include=set(_QUESTION))


def answers_of(
    folder: str | Path, teacher: nn.Module, data: DataSource, config: FinetuneConfig, compute: Compute
) -> Answers | None:
    """What `teacher` answers, by all that it depends on; None where it is asked otherwise, or in several processes."""
    asked = question(config)
    if asked is None or compute.world > 1:
        return None
    known = circumstances(teacher, data.content_hash, compute.device.type, compute.precision)
    described = {**known, "settings": asked}
    return Answers(folder, described, config.steps * config.batch_size)


class Answers:
    """A folder of predictions. described: all that they depend on, in JSON types; visits: how many there will be."""

    def __init__(self, folder: str | Path, described: Mapping[str, Any], visits: int) -> None:
        self.folder = Path(folder) / hashlib.sha256(canonical_json(described).encode()).hexdigest()[:16]
        self.visits = visits
        self._keeps: bool | None = None  # None: not known before the first answer

    def at(self, index: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        """The prediction [B, ...] for consecutive global sample numbers [B]; `ask` makes it, if it is not there.

        On the CPU if it was there, else where `ask` makes it.
        """
        path = self.folder / f"{int(index[0])}-{len(index)}.safetensors"
        if path.is_file():
            with suppress(CheckpointError, OSError):  # a damaged one is asked for again
                return weights.read_safetensors(path)["prediction"]
        answer = ask()
        try:
            if self._fits(answer.nbytes // len(index) * self.visits):
                weights.write_safetensors(path, {"prediction": answer}, lasting=False)
        except (CheckpointError, OSError):
            self._keeps = False  # no room after all, or another process clears up: no reason to stop
        return answer

    def _fits(self, size: int) -> bool:
        """Whether answers of `size` bytes in all may be kept: settled at the first, and while nobody fills the disk."""
        free = self._free()
        if self._keeps is None:
            self._keeps = size <= min(MOST_BYTES - self._held(), SHARE * free)
        return self._keeps and size <= free

    def _held(self) -> int:
        """Bytes of answers to other questions in the same folder."""
        return sum(
            path.stat().st_size
            for path in self.folder.parent.glob("*/*.safetensors")
            if path.parent != self.folder
        )

    def _free(self) -> float:
        place = next((folder for folder in self.folder.parents if folder.is_dir()), None)
        return math.inf if place is None else shutil.disk_usage(place).free

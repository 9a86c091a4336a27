"""What a checkpoint costs the training loop: the copy that it waits for, and the file that it does not wait for.

    python scripts/checkpoint_cost.py

States of both stages after one step, of `dit-fashion` and of a tiny DiT (4 blocks of width 32), copied and written
`--repeats` times in turns to a folder on disk. Prints JSON: sizes in MB, medians in ms; `wall` is by the clock,
`processor` the time of this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting import GraftPlan, Replace, distill, finetune, graft, load_model
from grafting.data import ImageLabelDataset
from grafting.families import family_of
from grafting.models.dit import DiT, DiTConfig
from grafting.runs.checkpoints import save_checkpoint
from grafting.training.loop import Quiet
from grafting.training.saving import snapshot

PLAN = GraftPlan([Replace("mha", "all", "hyena_x")])
STEP = {"steps": 1, "batch_size": 4, "num_validation": 4, "precision": "fp32"}


class Keeper(Quiet):
    """Keeps the last state."""

    state: Mapping[str, Any]

    def save_checkpoint(self, stage: str, step: int, state: Mapping[str, Any], keep: int) -> None:
        self.state = state


def states(teacher: nn.Module) -> dict[str, Mapping[str, Any]]:
    """The states of both stages after a step."""
    family, student = family_of(teacher), graft(teacher, PLAN)
    data = ImageLabelDataset(torch.randn(64, *family.sample_shape(teacher)), torch.arange(64) % 4)
    first, second = Keeper(), Keeper()
    distill(student, teacher, data, {**STEP, "fit_readout": False}, journal=first)
    finetune(student, data, STEP, journal=second)
    return {"stage 1": first.state, "stage 2": second.state}


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds by the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)


def measured(state: Mapping[str, Any], repeats: int) -> dict[str, float]:
    """Medians of copying and writing one state."""
    times: dict[str, list[tuple[float, float]]] = {"copy": [], "write": []}
    with tempfile.TemporaryDirectory() as folder:
        for step in range(repeats):
            times["copy"].append(timed(lambda: snapshot(state)))
            times["write"].append(timed(lambda step=step: save_checkpoint(Path(folder), step, state, 2)))  # type: ignore[misc]
        size = max(path.stat().st_size for path in Path(folder).glob("*.pt"))
    found = {"megabytes": round(size / 1e6, 2)}
    for what, pairs in times.items():
        for kind, values in zip(("wall", "processor"), zip(*pairs, strict=True), strict=True):
            found[f"{what}_{kind}_ms"] = round(statistics.median(values), 2)
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    tiny = DiT(
        DiTConfig(
            input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=4, num_heads=4, num_classes=4
        )
    )
    models = {"dit-fashion": load_model("dit-fashion"), "tiny": tiny}
    found = {
        name: {stage: measured(state, repeats) for stage, state in states(model).items()}
        for name, model in models.items()
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

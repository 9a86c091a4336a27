"""Where the time of the demo goes on a CPU: shares of PyTorch's operations in a few steps of a stage, or of sampling.

    OMP_NUM_THREADS=1 python scripts/profile_demo.py finetune        # or distill, sample

Settings of the recipe `demo` on `dit-fashion`, its data replaced by noise of the same shape. The first step is not
profiled. Shares are of time by the clock inside operations; seconds are of the processor, with the profiler at work.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from grafting import distill, finetune, graft, load_model
from grafting.data import ImageLabelDataset
from grafting.generation import generate
from grafting.recipes import load_recipe
from grafting.training.loop import Quiet

STEPS = 4


class Marks(Quiet):
    """Starts a profile before the second step, and notes the processor's time before every step."""

    def __init__(self, profiler: profile) -> None:
        super().__init__()
        self.profiler, self.times = profiler, list[float]()

    def stop_requested(self) -> None:
        if len(self.times) == 1:
            self.profiler.__enter__()
        self.times.append(time.process_time())


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("distill", "finetune", "sample"))
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    recipe, teacher = load_recipe("demo"), load_model("dit-fashion")
    student = graft(teacher, recipe.graft_plan, seed=0)
    profiler = profile(activities=[ProfilerActivity.CPU])
    marks = Marks(profiler)
    changes = {"steps": STEPS, "num_validation": 0, "precision": options.precision}
    torch.manual_seed(0)
    data = ImageLabelDataset(torch.randn(512, 1, 32, 32), torch.arange(512) % 10)
    if options.what == "distill" and recipe.distill is not None:
        config = recipe.distill.model_copy(update={**changes, "fit_samples": 64})
        distill(student, teacher, data, config, journal=marks)
    elif recipe.finetune is not None and options.what == "finetune":
        finetune(student, data, recipe.finetune.model_copy(update=changes), teacher, journal=marks)
    else:
        draw = {"steps": 3, "sampler": "dpm++", "batch_size": 64, "precision": options.precision}
        with tempfile.TemporaryDirectory() as folder:
            marks.stop_requested()
            marks.stop_requested()
            generate(student, Path(folder) / "x.npz", num=64, **draw)  # type: ignore[arg-type]
    marks.times.append(time.process_time())
    profiler.__exit__(None, None, None)
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print("seconds:", [round(b - a, 3) for a, b in zip(marks.times[1:], marks.times[2:], strict=False)])
    for row in rows[:25]:
        print(f"{row.key[:44]:44} {100 * row.self_cpu_time_total / total:6.2f} % {row.count:7d} calls")


if __name__ == "__main__":
    main()

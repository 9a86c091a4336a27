"""Dry runs of the packaged recipes at their real sizes: a table of memory, time and disk (Markdown).

python scripts/dry_runs.py [NAME ...] [--device cuda] [--processes 8]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafting.analysis.memory import gigabytes
from grafting.analysis.pace import Stopwatch
from grafting.errors import GraftError
from grafting.pipeline import Pipeline
from grafting.recipes import Recipe, experiments, load_recipe
from grafting.rehearsal import rehearse
from grafting.runs import RunFolder

STAGES = ("distill", "finetune", "sample")


STUDIES = (
    "table4",
    "objectives",
    "data-scale",
    "layer-choice",
)  # the paper's; the others are of the packaged model


def real_size() -> Iterator[tuple[str, Recipe]]:
    """Name and recipe of everything packaged that is of the paper's size."""
    for name in ("pixart-sigma-2k", "depth-to-width"):
        yield name, load_recipe(name)
    for study in STUDIES:
        for row in experiments()[study]:
            yield f"{study}/{row}", load_recipe(f"{study}/{row}", ["preset=paper"])


def rehearsed(recipe: Recipe, device: str, processes: int, watches: dict[str, Stopwatch]) -> dict[str, Any]:
    """The dry run of one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        return rehearse(
            Pipeline(recipe, RunFolder(Path(folder) / "run"), device), processes=processes, watches=watches
        )


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="Recipes (default: all of real size).")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    watches: dict[str, Stopwatch] = {}
    print("| recipe | memory of stage 1 | stage 2 | sampling | time of stage 1 | stage 2 | sampling | disk |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, recipe in real_size():
        if given.names and name not in given.names:
            continue
        try:
            found = rehearsed(recipe, given.device, given.processes, watches)
        except GraftError as error:  # layers by locality need the file of graft locality
            print(f"| {name} | {error} |" + " |" * 6, flush=True)
            continue
        stages = [found["stages"].get(stage) for stage in STAGES]
        memory = [gigabytes(stage["memory"]["total"]) if stage else "-" for stage in stages]
        hours = [f"{stage['seconds'] / 3600:,.1f} h" if stage else "-" for stage in stages]
        disk = gigabytes(sum(found["disk_bytes"].values())) if found["disk_bytes"] else "-"
        print(f"| {' | '.join([name, *memory, *hours, disk])} |", flush=True)


if __name__ == "__main__":
    main()

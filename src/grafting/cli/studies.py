"""Verbs that compare: study, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import new_console, show
from grafting.cli.options import Device, Json, Resume, Seed, Set


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="demo-ablation or donor-init.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/study-<name>.")] = None,
    model: Annotated[str | None, typer.Option(help="Another teacher.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.")] = None,
    resume: Resume = False, set: Set = None, device: Device = "cpu", seed: Seed = 0,
) -> None:  # fmt: skip
    """Run a set of experiments; finished rows are never run again."""
    from grafting.studies import run_study

    folder = out or Path("runs") / f"study-{name}"
    console = new_console()
    page = run_study(
        name, folder, console, model=model, resume=resume, seed=seed, only=only, device=device, changes=set
    )
    console.close()
    print(f"study: {page}")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="stage1: one pass for all operators against one job per operator.")],
    updates: Annotated[int, typer.Option(min=2, help="Optimizer steps of each side.")] = 40,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None, json_: Json = False,
) -> None:  # fmt: skip
    """Compare the speed of two ways in one run; report ratios."""
    from grafting.benchmarks import run_benchmark
    from grafting.formats.weights import write_json

    found = run_benchmark(what, updates=updates)
    if out:
        write_json(out, found)
    show(found, json_)

"""`graft study`: sets of experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import new_console
from grafting.cli.options import Device, Resume, Seed, Set


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

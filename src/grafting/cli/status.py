"""The verb `status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import show
from grafting.cli.options import Json


@app.command()
def status(run: Annotated[Path, typer.Argument(help="Run folder.")], json_: Json = False) -> None:
    """Where a run stands: running, finished, failed, stopped, dead or idle; step, ETA, losses, last error."""
    from grafting.runs import run_status

    show(run_status(run), json_)

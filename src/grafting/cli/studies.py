"""`graft study`: sets of experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import emit, new_console, refuse_several
from grafting.cli.options import Device, Dtype, Json, Resume, Seed, Set


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Name of a study (graft list names them), or the file of one.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/study-<name>.")] = None,
    model: Annotated[str | None, typer.Option(help="Another teacher.")] = None,
    data: Annotated[str | None, typer.Option(help="Other data: what the recipe key data takes.")] = None,
    preset: Annotated[str | None, typer.Option(help="small (default), paper or paper-code.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row; repeatable.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Rows at a time, each in a process of its own.")] = 1,
    reuse: Annotated[
        list[Path] | None, typer.Option(help="Folder of another study whose equal rows are taken over; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long; do nothing.")] = False,
    json_: Json = False,
    resume: Resume = False, set: Set = None, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Run a set of experiments; finished rows are never run again."""
    from grafting.errors import GraftError
    from grafting.studies import rehearse_study, run_study

    given = {"data": data, "preset": preset, "dtype": dtype}
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]
    folder = out or Path("runs") / f"study-{Path(name).stem if Path(name).is_file() else name}"
    if dry_run:
        from grafting.studies.rehearsal import in_words

        refuse_several("graft study --dry-run (for rows at a time say --jobs N)")
        found = rehearse_study(
            name, folder, model=model, resume=resume, seed=seed, only=only, device=device,
            changes=[*changes, *(set or [])], jobs=jobs, reuse=reuse or [],
        )  # fmt: skip
        if json_:
            emit(found)
        else:
            print("\n".join(in_words(found)))
        return
    if json_:
        raise GraftError("--json is for --dry-run: a study writes study.json")
    console = new_console()
    page = run_study(
        name, folder, console, model=model, resume=resume, seed=seed, only=only, device=device,
        changes=[*changes, *(set or [])], jobs=jobs, reuse=reuse or [],
    )  # fmt: skip
    console.close()
    print(f"study: {page}")

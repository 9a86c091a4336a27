"""Verbs that make a run folder or go on in one: demo, run, apply, distill, finetune, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import new_console, parse_dtype, recipe_changes, refuse_several, spread
from grafting.cli.options import (
    Device,
    Dtype,
    Heads,
    Locality,
    OwnSeed,
    Processes,
    Resume,
    RunDtype,
    RunSeed,
    Seed,
    Set,
    Source,
)

if TYPE_CHECKING:
    from grafting.runs import RunFolder


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/demo or runs/demo-text.")] = None,
    text: Annotated[bool, typer.Option("--text", help="A text-to-image model, and no data: pixart-emoji.")] = False,
    resume: Resume = False, set: Set = None, device: Device = "cpu", dtype: Dtype = None, seed: OwnSeed = None,
) -> None:  # fmt: skip
    """Half of the attention of the packaged dit-fashion becomes hyena_x: the whole method in minutes."""
    run(
        "demo-text" if text else "demo",
        out=out,
        resume=resume,
        set=set,
        dry_run=False,
        processes=1,
        device=device,
        dtype=dtype,
        seed=seed,
    )


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a packaged one (see graft list).")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name of the recipe>.")] = None,
    resume: Resume = False, set: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and its needs; do nothing.")] = False,
    processes: Processes = 1,
    device: Device = "cpu", dtype: Dtype = None, seed: OwnSeed = None,
) -> None:  # fmt: skip
    """Run a recipe: synthesize, graft, distill, finetune, sample, evaluate, report."""
    from grafting.errors import RunError
    from grafting.pipeline import Pipeline
    from grafting.processes import is_one_of_several
    from grafting.recipes import load_recipe
    from grafting.runs import RunFolder

    overrides = recipe_changes(set, dtype=dtype, seed=seed)
    if dry_run:
        refuse_several("graft run --dry-run (for an estimate of several say --processes N)")
    elif is_one_of_several():
        spread(processes, device)  # first of all, so that an error is printed once
    resolved = load_recipe(recipe, overrides)
    folder = out or Path("runs") / resolved.name
    if not dry_run:
        spread(processes, device)
    if dry_run:
        from grafting.rehearsal import in_words, rehearse
        from grafting.yaml_io import dump_yaml

        taken = _refusal(RunFolder(folder), resume)
        if taken and out is not None:
            raise RunError(taken)
        found = rehearse(Pipeline(resolved, RunFolder(folder, new_console()), device), processes=processes)
        print(dump_yaml(resolved.to_dict()), end="")
        for line in in_words(found):
            print(f"# {line}")  # what is printed stays a recipe
        if taken:
            print(f"# note: without --dry-run this would be refused: {taken}")
        return
    pipeline = Pipeline(resolved, RunFolder(folder, new_console()), device)
    pipeline.check(to_the_end=True)
    main_process = pipeline.compute.is_main
    if main_process:
        pipeline.run = RunFolder.create(folder, resolved.to_dict(), pipeline.run.console, resume=resume)
    pipeline.compute.wait()
    if not main_process:
        pipeline.run = RunFolder(folder, writer=False)
    page = pipeline.all()
    pipeline.run.console.close()
    if main_process:
        _print_results(folder)
        print(f"report: {page}")


@app.command()
def apply(
    source: Source, out: Annotated[Path, typer.Option(help="Run folder to make.")],
    plan: Annotated[Path | None, typer.Option(help="Plan file, YAML or JSON.")] = None,
    student: Annotated[str | None, typer.Option(help="Folder of a graft or of a run, instead of a plan.")] = None,
    data: Annotated[str, typer.Option(help="Data of the later stages.")] = "fashion-10",
    num_heads: Heads = None, locality: Locality = None, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Make a run folder of an edited model, ready for distill and finetune: a plan applied, or a saved graft."""
    from grafting.errors import PlanError
    from grafting.pipeline import Pipeline
    from grafting.plan import GraftPlan
    from grafting.recipes import load_recipe
    from grafting.runs import RunFolder

    refuse_several("graft apply")
    if (plan is None) == (student is None):
        raise PlanError("graft apply: give --plan FILE or --student FOLDER (one of them)")
    recipe = load_recipe({
        "name": out.name, "model": source, "num_heads": num_heads, "dtype": dtype, "data": data, "seed": seed,
        "student": student,
        "plan": GraftPlan.load(plan).to_dict()["entries"] if plan else [],
        "locality": str(locality) if locality else None,
    })  # fmt: skip
    pipeline = Pipeline(recipe, RunFolder(out, new_console()), device)
    pipeline.check()
    pipeline.run = RunFolder.create(out, recipe.to_dict(), pipeline.run.console, resumable=False)
    pipeline.graft()
    print(f"grafted: {out}/graft")


@app.command()
def distill(
    run: Annotated[Path, typer.Argument(help="Run folder.")], resume: Resume = False, processes: Processes = 1,
    device: Device = "cpu", dtype: RunDtype = None, seed: RunSeed = None,
) -> None:  # fmt: skip
    """Stage 1 on a run folder: the new operators learn what the donor's do."""
    _stage(run, "distill", resume, device, processes, dtype, seed)


@app.command()
def finetune(
    run: Annotated[Path, typer.Argument(help="Run folder.")], resume: Resume = False, processes: Processes = 1,
    device: Device = "cpu", dtype: RunDtype = None, seed: RunSeed = None,
) -> None:  # fmt: skip
    """Stage 2 on a run folder: the whole edited model, lightly."""
    _stage(run, "finetune", resume, device, processes, dtype, seed)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.html of a run folder again."""
    from grafting.report import write_report
    from grafting.runs import RunFolder

    print(f"report: {write_report(RunFolder.open(run).path)}")


def _stage(
    folder: Path, stage: str, resume: bool, device: str, processes: int, dtype: str | None, seed: int | None
) -> None:  # fmt: skip
    from grafting.errors import RunError
    from grafting.pipeline import open_pipeline

    spread(processes, device)
    console = new_console()
    parse_dtype(dtype)
    pipeline = open_pipeline(folder, console, device)
    pipeline.check_same(seed=seed, dtype=dtype)
    if pipeline.run.result(stage) is not None:
        if not resume:
            raise RunError(f"{str(folder)!r}: {stage} is done already; use another run folder to do it again")
        if pipeline.compute.is_main:
            print(f"{stage}: {folder} (done already)")
        return
    started = any((folder / "checkpoints" / stage).glob("*.pt"))
    if started and not resume:
        raise RunError(f"{str(folder)!r}: {stage} was begun; go on with --resume")
    pipeline.check()
    getattr(pipeline, stage)()
    console.close()
    if pipeline.compute.is_main:
        print(f"{stage}: {folder}")


def _refusal(run: RunFolder, resume: bool) -> str | None:
    """Why a run could not be in this folder, if so."""
    from grafting.errors import RunError

    try:
        run.check_free(resume=resume)
    except RunError as error:
        return str(error)
    return None


def _print_results(folder: Path) -> None:
    """The table that ends a run."""
    from grafting.report.text import results_table

    print(results_table(folder))

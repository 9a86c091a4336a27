"""`graft search`: which operator in which layer, under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import emit, new_console, recipe_changes, refuse_several, spread
from grafting.cli.options import Device, Dtype, Json, OwnSeed, Processes, Set


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="Recipe file or name: model, data, settings; its plan is not used.")],
    candidates: Annotated[Path, typer.Option(help="Plan file; each entry may stand in any of its layers.")],
    budget: Annotated[float | None, typer.Option(help="Cost afterwards, as a share of the model's: 0.8.")] = None,
    replace: Annotated[int, typer.Option(min=0, help="How many operators are replaced, at least.")] = 0,
    by: Annotated[str, typer.Option(help="What is budgeted: flops, params, or latency on the device.")] = "flops",
    num: Annotated[int, typer.Option(min=1, help="Noised samples that damage is measured on.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/search-<name of the recipe>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a folder that was begun, or refuse it.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, how long, if the aim can be met; do nothing.")
    ] = False,
    set: Set = None, processes: Processes = 1, device: Device = "cpu", dtype: Dtype = None,
    seed: OwnSeed = None, json_: Json = False,
) -> None:  # fmt: skip
    """Which operator in which layer: distill all candidates, score each alone, choose under a budget; resumable."""
    from grafting.plan import GraftPlan
    from grafting.recipes import load_recipe
    from grafting.report.search import search_remarks, search_rows
    from grafting.report.text import table
    from grafting.search import search_plan

    if dry_run:
        refuse_several("graft search --dry-run (for an estimate of several say --processes N)")
    else:
        compute = spread(processes, device)
    resolved = load_recipe(recipe, recipe_changes(set, dtype=dtype, seed=seed))
    folder = out or Path("runs") / f"search-{resolved.name}"
    if dry_run:
        from grafting.search.rehearsal import in_words, rehearse_search

        expected = rehearse_search(
            resolved, GraftPlan.load(candidates), folder, budget=budget, at_least=replace, by=by,  # type: ignore[arg-type]
            num_samples=num, device=device, resume=resume, processes=processes,
        )  # fmt: skip
        if json_:
            emit(expected)
        else:
            print("\n".join(in_words(expected)))
        return
    console = new_console()
    found = search_plan(
        resolved, GraftPlan.load(candidates), folder, console, budget=budget, at_least=replace, by=by,  # type: ignore[arg-type]
        num_samples=num, device=device, resume=resume,
    )  # fmt: skip
    console.close()
    if not compute.is_main:
        return
    if json_:
        emit(found)
        return
    rows = search_rows(found)
    print(table(list(rows[0]), rows))
    for line in [*search_remarks(found), f"written: {folder}/plan.yaml, graft, recipe.yaml, search.html"]:
        print(line)

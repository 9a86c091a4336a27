"""`graft geneval`: images for GenEval's evaluator, and a table of what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grafting.cli.app import app
from grafting.cli.common import new_console, parse_dtype, show, spread
from grafting.cli.options import Device, Dtype, Json, Processes, Rest, Seed

group = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Images for GenEval's evaluator (export), and a table of what it found (score).",
)
app.add_typer(group, name="geneval")


@group.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder of a grafted or stock pipeline, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of images; drawn ones are kept when it is run again.")],
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; default: GenEval's 553, fetched.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Images of every prompt.")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 means none.")] = 4.5,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels; default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels; default: the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    pipeline: Rest = None, processes: Processes = 1, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Write images in the layout that the public evaluator reads; goes on where it was stopped."""
    from grafting.evaluation.geneval import export_images, fetch_prompts, prompt_sampler, read_prompts
    from grafting.pipelines import load_pipeline

    compute, fetched = spread(processes, device), out.parent / "geneval-prompts.jsonl"
    if prompts is None and compute.is_main:
        fetch_prompts(fetched)
    compute.wait()
    chosen = read_prompts(prompts or fetched)
    loaded = load_pipeline(model, pipeline, device=compute.device, dtype=parse_dtype(dtype))
    loaded.set_progress_bar_config(disable=True)
    draw = prompt_sampler(loaded, steps=steps, guidance=guidance, height=height, width=width)
    console = new_console(quiet=not compute.is_main)
    described: dict[str, Any] = {
        "model": model, "steps": steps, "guidance": guidance, "height": height, "width": width, "dtype": dtype,
        **({"pipeline": pipeline} if pipeline else {}),
    }  # fmt: skip
    export_images(
        draw, chosen, out, num=num, batch_size=batch_size, seed=seed, describe=described, compute=compute,
        progress=lambda done, total: console.progress("geneval", done, total, "prompts"),
    )  # fmt: skip
    console.close()
    if compute.is_main:
        print(f"images: {out}")


@group.command()
def score(
    results: Annotated[Path, typer.Argument(help="JSON lines that the evaluator wrote.")],
    against: Annotated[
        Path | None, typer.Option(help="Results of the teacher on the same prompts, beside it.")
    ] = None,
    json_: Json = False,
) -> None:
    """Six tasks and the overall score (the mean of the tasks), in per cent."""
    from grafting.evaluation.geneval import compare_scores
    from grafting.evaluation.geneval import score as read_score

    found = read_score(results)
    if against is None:
        show(found.to_dict(), json_, [("task", "score", "images")], "rows")
        return
    show(
        compare_scores(found, read_score(against)),
        json_,
        [("task", "teacher", "student", "difference", "images")],
        "rows",
    )

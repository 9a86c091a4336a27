"""Verbs of text-to-image models: synthesize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import new_console, parse_dtype, spread
from grafting.cli.options import Device, Dtype, Precision, Processes, Rest, Resume, Seed


@app.command()
def synthesize(
    source: Annotated[str, typer.Argument(help="Pipeline folder, hub id, or a graft of one.")],
    prompts: Annotated[
        Path, typer.Option(help="One a line, or JSON lines with a key prompt, caption or text; or emoji-train.")
    ],
    num: Annotated[int, typer.Option(min=1, help="Number of pairs; prompts are taken in order.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of DPM-Solver++.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 means none.")] = 4.5,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs per file: what a stop can lose.")] = 64,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of a caption; default the pipeline's own.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut longer prompts instead of refusing them.")] = False,
    pipeline: Rest = None, processes: Processes = 1, precision: Precision = "fp32",
    resume: Resume = False, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Sample image-text pairs from a text-to-image model itself: latents and encoded captions, to train on."""
    from grafting.synthesis import Synthesis
    from grafting.synthesis import synthesize as make

    compute = spread(processes, device, precision)
    settings = Synthesis(
        num=num, steps=steps, guidance=guidance, height=height, width=width, batch_size=batch_size,
        shard_size=shard_size, seed=seed, max_tokens=max_tokens, truncate=truncate,
    )  # fmt: skip
    console = new_console(quiet=not compute.is_main)
    page = make(
        source, prompts, out, settings, compute=compute, dtype=parse_dtype(dtype), resume=resume, pipeline=pipeline,
        progress=lambda what, done, total: console.progress("synthesize", done, total, what),
    )  # fmt: skip
    console.close()
    if compute.is_main:
        print(f"pairs: {out}")
        print(f"page: {page}")

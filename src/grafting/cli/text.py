"""Verbs of text-to-image models: synthesize."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import new_console, parse_dtype
from grafting.cli.options import Device, Dtype, Resume, Seed


@app.command()
def synthesize(
    source: Annotated[str, typer.Argument(help="Pipeline folder, hub id, or a graft of one.")],
    prompts: Annotated[Path, typer.Option(help="One a line, or JSON lines with a key prompt, caption or text.")],
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
    processes: Annotated[int, typer.Option(min=1, help="Processes (GPUs) to spread over.")] = 1,
    resume: Resume = False, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Sample image-text pairs from a text-to-image model itself: latents and encoded captions, to train on."""
    from grafting.cli.runs import _launch
    from grafting.loading import as_device
    from grafting.synthesis import Synthesis
    from grafting.synthesis import synthesize as make
    from grafting.training.compute import make_compute

    if processes > 1 and "WORLD_SIZE" not in os.environ:
        _launch(processes)
    settings = Synthesis(
        num=num, steps=steps, guidance=guidance, height=height, width=width, batch_size=batch_size,
        shard_size=shard_size, seed=seed, max_tokens=max_tokens, truncate=truncate,
    )  # fmt: skip
    compute = make_compute(as_device(device), "fp32")
    console = new_console()
    page = make(
        source, prompts, out, settings, compute=compute, dtype=parse_dtype(dtype), resume=resume,
        progress=lambda what, done, total: console.progress("synthesize", done, total, what),
    )  # fmt: skip
    console.close()
    if compute.is_main:
        print(f"pairs: {out}")
        print(f"page: {page}")

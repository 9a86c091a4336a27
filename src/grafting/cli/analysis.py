"""Verbs that measure a running model: locality, activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import emit, new_console, open_model
from grafting.cli.options import Device, Dtype, Heads, Json, Seed, Source

Num = Annotated[int, typer.Option(min=1, help="Number of samples.")]
Bins = Annotated[int, typer.Option(min=1, max=1000, help="Bins of timesteps in the heat maps.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON file here.")]
Page = Annotated[Path | None, typer.Option(help="Write a page with heat maps here.")]


@app.command()
def locality(
    source: Source,
    data: Annotated[str | None, typer.Option(help="Measure on noised samples of this data instead.")] = None,
    k: Annotated[list[int] | None, typer.Option("--k", min=0, help="Band width; repeatable. Default N / 8.")] = None,
    num: Num = 250,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps; default 50.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim (default), ddpm or dpm++.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; default 1.5.")] = None,
    bins: Bins = 10, batch_size: Annotated[int, typer.Option(min=1)] = 50, out: Out = None, html: Page = None,
    num_heads: Heads = None, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """How local each layer's attention is; the file it writes is what top-local-50 and low-local-50 read."""
    from grafting.analysis.locality import measure_locality
    from grafting.data import load_dataset
    from grafting.formats.weights import write_json
    from grafting.report.locality import locality_remarks, locality_rows, write_locality
    from grafting.report.text import table

    console = new_console()
    found = measure_locality(
        open_model(source, num_heads=num_heads, device=device, dtype=dtype), load_dataset(data) if data else None,
        widths=k, num_samples=num, steps=steps, sampler=sampler, guidance=guidance, timestep_bins=bins,
        batch_size=batch_size, seed=seed,
        progress=lambda done, total: console.progress("locality", done, total, "passes"),
    )  # fmt: skip
    console.close()
    if out:
        write_json(out, found)
    if html:
        write_locality(html, found)
    if json_:
        emit(found)
        return
    rows = locality_rows(found)
    print(table(list(rows[0]), rows))
    for line in [*locality_remarks(found), *(f"written: {path}" for path in (out, html) if path)]:
        print(line)


@app.command()
def activations(
    source: Source,
    data: Annotated[str, typer.Option(help="Data to noise: fashion-10, .npz, .safetensors, a folder.")],
    num: Num = 256, bins: Bins = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples whose activations are held at a time.")] = 16,
    out: Out = None, html: Page = None, num_heads: Heads = None,
    device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """What operators see and make, and the stage-1 loss that it asks for; loss: auto can read the file."""
    from grafting.analysis.activations import measure_activations
    from grafting.data import load_dataset
    from grafting.formats.weights import write_json
    from grafting.report.activations import activation_remarks, activation_rows, write_activations
    from grafting.report.text import table

    console = new_console()
    found = measure_activations(
        open_model(source, num_heads=num_heads, device=device, dtype=dtype), load_dataset(data), num_samples=num,
        timestep_bins=bins, batch_size=batch_size, seed=seed,
        progress=lambda done, total: console.progress("activations", done, total, "passes"),
    )  # fmt: skip
    console.close()
    if out:
        write_json(out, found)
    if html:
        write_activations(html, found)
    if json_:
        emit(found)
        return
    rows = activation_rows(found)
    print(table(list(rows[0]), rows))
    for line in [*activation_remarks(found), *(f"written: {path}" for path in (out, html) if path)]:
        print(line)

"""`graft bench`: where speed is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import refuse_several, show
from grafting.cli.options import Json


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="operators, stage1, stage2, sample, depth, stage1-memory or all.")],
    size: Annotated[
        str | None,
        typer.Option(help="operators: XL-4096, PixArt-2K; others: dit-fashion, or an arch; all: real, tiny."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="stage2: samples per forward pass.")] = None,
    updates: Annotated[int | None, typer.Option(min=1, help="stage1, stage2: optimizer steps of each side.")] = None,
    layers: Annotated[str | None, typer.Option(help="stage1: which are edited: interleaved-50, all.")] = None,
    reuse: Annotated[int | None, typer.Option(min=1, help="stage1: updates per teacher pass.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="stage1: published jobs to run, for all.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="sample: of DDIM.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed turns of each side (not stage1).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, and float16 (operators, depth) or auto (the others).")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="stage2, sample, depth: eager (default), compiled or both.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="As elsewhere; times do not hang on values.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None, json_: Json = False,
) -> None:  # fmt: skip
    """Compare the speed of two ways in one run; report ratios."""
    from grafting.benchmarks import run_benchmark
    from grafting.formats.weights import write_json

    refuse_several("graft bench")
    found = run_benchmark(
        what, size=size, batch_size=batch_size, micro_batch=micro_batch, updates=updates, layers=layers, reuse=reuse,
        jobs=jobs, steps=steps, repeats=repeats, device=device, dtype=dtype, mode=mode,
    )  # fmt: skip
    if out:
        write_json(out, found)
    columns = _COLUMNS.get(what)
    show(found, json_, [columns] if columns else None, "rows" if columns else "")


_COLUMNS: dict[str, tuple[str, ...]] = {
    "operators": (
        "operator", "part", "seconds", "baseline", "baseline_seconds", "ratio", "flop_ceiling", "share_of_copy",
        "share_of_matmul",
    ),
    "stage1-memory": ("way", "operators", "weights", "optimizer", "activations", "total", "ratio"),
    "depth": ("branches", "mode", "depth", "params", "flops_per_image", "median_ms", "speedup", "share_of_matmul"),
    "stage2": ("loop", "precision", "seconds", "images_per_s", "ratio", "share_of_matmul"),
    "sample": ("model", "mode", "precision", "seconds", "images_per_s", "ratio", "share_of_matmul"),
}  # fmt: skip

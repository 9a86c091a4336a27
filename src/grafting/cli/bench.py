"""`graft bench`: where speed is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import show
from grafting.cli.options import Json


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="operators, depth or stage1.")],
    size: Annotated[
        str | None, typer.Option(help="operators: such as XL/2-256 or PixArt-2K; depth: such as XL/2 or XL/2-D4.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    updates: Annotated[int | None, typer.Option(min=2, help="stage1: optimizer steps of each side.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="operators, depth: timed calls of each side.")] = None,
    device: Annotated[str | None, typer.Option(help="operators, depth: cpu, cuda, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="operators, depth: float32, bfloat16, float16.")] = None,
    mode: Annotated[str | None, typer.Option(help="depth: eager (default), compiled or both.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None, json_: Json = False,
) -> None:  # fmt: skip
    """Compare the speed of two ways in one run; report ratios."""
    from grafting.benchmarks import run_benchmark
    from grafting.formats.weights import write_json

    found = run_benchmark(
        what,
        size=size,
        batch_size=batch_size,
        updates=updates,
        repeats=repeats,
        device=device,
        dtype=dtype,
        mode=mode,
    )
    if out:
        write_json(out, found)
    columns: tuple[str, ...] = (
        "operator",
        "part",
        "seconds",
        "baseline",
        "baseline_seconds",
        "ratio",
        "flop_ceiling",
    )
    if what == "depth":
        columns = ("branches", "mode", "depth", "params", "flops_per_image", "median_ms", "speedup")
    show(found, json_, [columns] if "rows" in found else None, "rows" if "rows" in found else "")

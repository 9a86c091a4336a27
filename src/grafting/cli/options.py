"""Options and arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="Type of the weights: float32, bfloat16, float16.")]
Precision = Annotated[
    str, typer.Option(help="fp32, bf16 (autocast; first and last layer stay float32), or auto.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
# Every verb that loads a model or runs something takes --device, --dtype and --seed: scripts can give them to all.
AnyDevice = Annotated[
    str, typer.Option("--device", help="As elsewhere; nothing is computed here, so it changes nothing.")
]
AnyDtype = Annotated[
    str | None, typer.Option("--dtype", help="As elsewhere; here it changes the memory taken and no number.")
]
AnySeed = Annotated[
    int, typer.Option("--seed", min=0, help="As elsewhere; nothing is drawn here, so it changes nothing.")
]
OwnSeed = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of every draw; default the recipe's.")
]
RunDtype = Annotated[
    str | None, typer.Option("--dtype", help="The run's own; another is refused, it would be another run.")
]
RunSeed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="The run's own; another is refused, it would be another run."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Source = Annotated[
    str, typer.Argument(help="Packaged name, .pt file, folder (model, graft, run), hub id, or arch:DiT-XL/2.")
]
Rest = Annotated[
    str | None,
    typer.Option(
        "--pipeline", help="Folder or hub id of text encoder and VAE, for a transformer that stands alone."
    ),
]
Plan = Annotated[Path, typer.Option("--plan", help="Plan file, YAML or JSON.")]
Heads = Annotated[
    int | None, typer.Option(min=1, help="Number of heads, for a file of an unpublished width.")
]
Locality = Annotated[Path | None, typer.Option(help="Locality file for top-local-50 and low-local-50.")]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes on this machine: one for each GPU, or shares of the CPU.")
]
BatchSize = Annotated[
    str, typer.Option(help="Samples at once; auto: as many as memory takes.", metavar="INTEGER|auto")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override of the recipe: key=value or stage.key=value; repeatable."),
]

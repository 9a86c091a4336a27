"""Verbs about samples: sample, evaluate, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import (
    check_common,
    new_console,
    open_model,
    parse_batch_size,
    parse_compile,
    parse_dtype,
    show,
    spread,
)
from grafting.cli.options import (
    AnySeed,
    BatchSize,
    Device,
    Dtype,
    Heads,
    Json,
    Precision,
    Processes,
    Rest,
    Seed,
    Source,
)

FeatureDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="As elsewhere; feature networks have a type of their own, so it changes nothing."
    ),
]


@app.command()
def sample(
    source: Source,
    out: Annotated[Path, typer.Option(help="Where to write the .npz; a .png grid goes beside it.")],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")],
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm or dpm++.")] = "ddim",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 means none.")] = 1.5,
    batch_size: BatchSize = "100",
    vae: Annotated[str | None, typer.Option(help="Folder or hub id of the VAE of a latent model.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="For text to image: a file, or emoji-held-out.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut longer prompts instead of refusing them.")] = False,
    pipeline: Rest = None,
    data: Annotated[Path | None, typer.Option(help="Captions for one: a folder of graft synthesize.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes: 3,5,7 (repeated), or a .npy, .npz, .txt file with one an image.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels, where the model takes other sizes.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    precision: Precision = "fp32",
    compile_: Annotated[str, typer.Option("--compile", help="on, off, or auto: on CUDA.")] = "auto",
    num_heads: Heads = None, device: Device = "cpu", dtype: Dtype = None, seed: Seed = 0,
    processes: Processes = 1,
) -> None:  # fmt: skip
    """Draw images; noise and label of image i depend on the seed and i alone. Given again after a stop, it goes on."""
    from grafting.class_labels import read_labels
    from grafting.generation import generate
    from grafting.text_inputs import text_inputs

    at_once, compiling = parse_batch_size(batch_size), parse_compile(compile_)
    compute = spread(processes, device)
    chosen = read_labels(labels, num) if labels is not None else None
    console = new_console(quiet=not compute.is_main)
    model = open_model(
        source, num_heads=num_heads, device=str(compute.device), dtype=dtype, pipeline=pipeline
    )
    model, captions = text_inputs(
        model, prompts=prompts, data=data, size=(height, width), limit=num, dtype=parse_dtype(dtype), truncate=truncate
    )  # fmt: skip
    generate(
        model, out, num=num, captions=captions, labels=chosen, steps=steps, sampler=sampler,
        guidance=guidance, seed=seed, batch_size=at_once, precision=precision, compile=compiling, vae=vae,
        describe={"model": source},
        progress=lambda done, total: console.progress("sample", done, total, "images"),
    )  # fmt: skip
    console.close()
    if compute.is_main:
        print(f"samples: {out}")


@app.command()
def evaluate(
    samples: Annotated[Path, typer.Argument(help="Sample file (.npz).")],
    reference: Annotated[
        str | None, typer.Option(help="fashion-train, an ADM reference .npz, or another sample file.")
    ] = None,
    features: Annotated[str, typer.Option(help="auto, fashion, or inception:WEIGHTS.")] = "auto",
    clip: Annotated[str | None, typer.Option(help="A CLIP (folder or hub id): alignment with the captions.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="With --clip: a prompt for each image; default: those that graft sample left.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result here, for graft compare.")] = None,
    device: Device = "cpu", dtype: FeatureDtype = None, seed: AnySeed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """Frechet distance, precision, recall, inception-style score and label accuracy of a sample file; CLIP score."""
    from grafting.errors import GraftError
    from grafting.evaluation import evaluate as measure
    from grafting.evaluation.alignment import evaluate_alignment
    from grafting.formats.weights import write_json

    if reference is None and clip is None:
        raise GraftError("nothing to measure against: give --reference, --clip, or both")
    if reference is None and features != "auto":
        raise GraftError(f"--features {features} is for a --reference: give one, or leave it out")
    if clip is None and captions is not None:
        raise GraftError("--captions is for --clip: give a CLIP, or leave it out")
    check_common(device, dtype)
    parts = []
    if reference is not None:
        parts.append(measure(samples, reference, features, device=device))
    if clip is not None:
        parts.append(evaluate_alignment(samples, clip, captions, device=device))
    found = {key: {k: v for part in parts for k, v in part[key].items()} for key in ("metrics", "protocol")}
    if out:
        write_json(out, found)
    show(found, json_)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="JSON of graft evaluate, or a run (its student).")],
    b: Annotated[Path, typer.Argument(help="Another one.")], json_: Json = False,
) -> None:  # fmt: skip
    """Two evaluations side by side; refuses unlike protocols."""
    from grafting.evaluation import compare as compare_two
    from grafting.evaluation import read_evaluation

    show(compare_two(read_evaluation(a), read_evaluation(b)), json_)

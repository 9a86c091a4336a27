"""Verbs about training data: encode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafting.cli.app import app
from grafting.cli.common import emit, new_console, show
from grafting.cli.options import Device, Json, Seed


@app.command()
def encode(
    images: Annotated[
        str, typer.Argument(help="Folder of images, .tar or .parquet files (patterns are fine), or hub:OWNER/NAME.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of latents to make, or to go on with.")],
    vae: Annotated[str | None, typer.Option(help="Folder or hub id of the VAE; default sd-vae-ft-ema.")] = None,
    size: Annotated[int, typer.Option(help="Pixels of a side after the crop.")] = 256,
    mode: Annotated[str, typer.Option(help="sample: a draw of the posterior; mean: its mean.")] = "sample",
    flip: Annotated[bool, typer.Option("--flip", help="Also encode the mirrored images.")] = False,
    store: Annotated[str, typer.Option(help="Type on disk: float16, bfloat16, float32.")] = "float16",
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32, bfloat16, float16.")] = "float32",
    shard_size: Annotated[int, typer.Option(help="Images per file.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Images per pass of the VAE.")] = 32,
    num_classes: Annotated[int | None, typer.Option(help="Number of classes, if the images do not say.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Column of images (Parquet, hub).")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels (Parquet, hub).")] = None,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Follow links out of the folder.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes (GPUs) to spread over.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per process that decode images.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a folder that was begun, or refuse it.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    device: Device = "cpu", seed: Seed = 0, json_: Json = False,
) -> None:  # fmt: skip
    """Encode images to VAE latents: sharded, memory-mapped, resumable, the same bytes for any number of processes."""
    from grafting.data import EncodeConfig, encode_images, open_images, preview_encoding
    from grafting.data.encoding import describe_manifest

    config = EncodeConfig(
        vae=vae, size=size, mode=mode, seed=seed, flip=flip, dtype=store, compute_dtype=dtype,
        shard_size=shard_size, batch_size=batch_size, num_classes=num_classes,
    )  # fmt: skip
    source = open_images(
        images,
        split=split,
        image_column=image_column,
        label_column=label_column,
        follow_links=follow_links,
    )
    if dry_run:
        show(
            preview_encoding(source, out, config, device=device, processes=processes, num_threads=threads),
            json_,
        )
        return
    console = new_console()
    manifest = encode_images(
        source, out, config, device=device, processes=processes, num_threads=threads, resume=resume, console=console
    )  # fmt: skip
    console.close()
    if manifest is None:
        console.say("this process's shards are done; the last process to end writes latents.json")
    elif json_:
        emit(describe_manifest(manifest, out))
    else:
        show(describe_manifest(manifest, out), False)

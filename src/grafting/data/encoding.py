"""Images to a folder of VAE latents: one process, several of ours, or one of those that a launcher started."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from grafting.console import Console
from grafting.data.encoder import EncodeConfig, ShardEncoder
from grafting.data.image_source import ImageSource
from grafting.data.images import ImageFolder, open_images
from grafting.data.latent_folder import LatentFolder
from grafting.data.manifest import SKIPPED, Manifest
from grafting.data.pixels import quiet_decoding
from grafting.data.workers import encode_in_processes
from grafting.errors import DataError
from grafting.processes import own_device, place

_SLACK_BYTES = 1 << 20


class Meter:
    """Images done and skipped, and how fast: what the console shows."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done, self.skipped = console, total, done, 0
        self._started, self._first = time.monotonic(), done

    def __call__(self, num: int, skipped: int) -> None:
        self.done += num
        self.skipped += skipped
        rate = (self.done - self._first) / max(time.monotonic() - self._started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        note = f"{rate:.1f} images/s, {duration(left)} left"
        self.console.progress(
            "encode", self.done, self.total, note + (f", {self.skipped} skipped" if self.skipped else "")
        )


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def encode_images(
    images: str | Path | ImageSource,
    out: str | Path,
    config: EncodeConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    processes: int = 1,
    num_threads: int | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> Manifest | None:
    """Encode images to VAE latents in a folder of shards that `load_dataset` opens; returns its manifest.

    `images` is what `open_images` takes. A folder that was begun is gone on with where it stopped; a finished one is
    checked against its hashes. With `processes` above 1 that many are started (on a GPU each takes its own). Under
    `torchrun`, `accelerate launch` or `srun` each process makes the shards of its rank, and the last to end writes the
    manifest; the others return None. The files are byte-identical for any number of processes.
    Raises `DataError`; an image that can't be decoded is skipped and listed in `skipped.jsonl`.
    """
    from grafting.loading import as_device

    config, console = config or EncodeConfig(), console or Console(quiet=True)
    if processes < 1:
        raise DataError(f"processes={processes}: expected at least 1")
    source = open_images(images) if isinstance(images, (str, Path)) else images
    if isinstance(source, ImageFolder) and Path(out).resolve().is_relative_to(source.root.resolve()):
        raise DataError(f"{str(out)!r} lies in the folder of images; give an --out elsewhere")
    here = place()
    rank, world = here.rank, here.world
    where = own_device(str(device), here.local_rank) if world > 1 else device
    encoder = ShardEncoder(source, config, as_device(where), num_threads)
    folder = LatentFolder(out, console.say)
    folder.begin(encoder.job, resume=resume)
    mine = range(rank, encoder.num_shards, world)
    todo = folder.missing(mine)
    total = sum(len(encoder.span(shard)) for shard in mine)
    left = sum(len(encoder.span(shard)) for shard in todo)
    if left < total:
        console.say(f"{total - left} of {total} images are done and were checked against their hashes")
    _check_room(folder.path, encoder.num_bytes(left))
    meter = Meter(console, total, total - left)
    with quiet_decoding():
        if processes > 1 and world == 1 and len(todo) > 1:
            encode_in_processes(source, config, str(device), folder, todo, processes, num_threads, meter)
        else:
            for shard in todo:
                folder.write(shard, encoder.span(shard), *encoder.encode(shard, meter))
    return folder.finish(encoder.num_shards)


def preview_encoding(
    images: str | Path | ImageSource,
    out: str | Path,
    config: EncodeConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    processes: int = 1,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """What `encode_images` would do: counts, bytes on disk, and the time by two batches that are dropped."""
    from grafting.loading import as_device

    config = config or EncodeConfig()
    source = open_images(images) if isinstance(images, (str, Path)) else images
    encoder = ShardEncoder(source, config, as_device(device), num_threads)
    folder = LatentFolder(out)
    begun = folder.job() is not None
    if begun:
        folder.begin(encoder.job)
    todo = folder.missing(range(encoder.num_shards)) if begun else list(range(encoder.num_shards))
    left = sum(len(encoder.span(shard)) for shard in todo)
    with quiet_decoding():
        rate = encoder.measure(min(config.batch_size, len(source)))
    used = min(processes, max(1, len(todo)))
    return {
        "images": len(source), "kind": source.kind, "classes": encoder.num_classes, "labelled": encoder.labelled,
        "vae": encoder.job["vae"]["source"], "scaling_factor": encoder.scaling, "shape": list(encoder.shape),
        "dtype": config.dtype, "flip": config.flip, "shards": encoder.num_shards, "shards_left": len(todo),
        "images_left": left, "disk_bytes": encoder.num_bytes(len(source)), "free_bytes": _free(folder.path),
        "images_per_second_per_process": rate,
        "seconds_left": left / rate / used,
    }  # fmt: skip


def describe_manifest(manifest: Manifest, out: str | Path) -> dict[str, Any]:
    """The result in a few lines."""
    return {
        "latents": str(out), "images": manifest.num, "skipped": manifest.num_skipped,
        "skipped_log": str(Path(out) / SKIPPED), "classes": manifest.num_classes, "labelled": manifest.labelled,
        "shape": list(manifest.shape), "dtype": manifest.dtype, "flip": manifest.flip, "vae": manifest.vae.source,
        "scaling_factor": manifest.vae.scaling_factor, "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards), "sha256": manifest.sha256,
    }  # fmt: skip


def _free(folder: Path) -> int:
    nearest = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), Path("."))
    return shutil.disk_usage(nearest).free


def _check_room(folder: Path, num_bytes: int) -> None:
    free = _free(folder)
    if num_bytes + _SLACK_BYTES > free:
        raise DataError(
            f"{str(folder)!r}: the latents need {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, or "
            "give another --out, fewer images, no --flip, or a half-precision --store"
        )

"""One process's share of encoding: a shard of images, decoded by threads, through the VAE, to a file.

The bytes of a shard are a function of its images, the VAE and the settings: noise is drawn by the image's number,
every batch has the same shape (gaps of images that can't be read are filled with black), and on a CPU one thread
computes. So neither the number of processes nor a damaged image changes what another image becomes.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grafting import draws
from grafting.cores import usable_cores
from grafting.data.image_source import ImageSource
from grafting.data.manifest import MAX_SHARDS
from grafting.data.pixels import Skipped, decode_image, preprocessing
from grafting.errors import DataError

_AHEAD = 3  # batches being decoded while one is encoded
_DTYPES = ("float32", "bfloat16", "float16")
_MODES = ("sample", "mean")
Progress = Callable[[int, int], None]  # images done, images skipped, since the last call


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How images become latents. Raises `DataError` for a value that can't be."""

    vae: str | None = None  # folder or hub id; None: sd-vae-ft-ema
    size: int = 256  # pixels of a side
    mode: str = "sample"  # a draw of the posterior, or its mean
    seed: int = 0
    flip: bool = False  # also the mirrored images
    dtype: str = "float16"  # on disk
    compute_dtype: str = "float32"
    shard_size: int = 10_000  # images
    batch_size: int = 32
    num_classes: int | None = None  # None: what the images say

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mode", self.mode, _MODES), ("dtype", self.dtype, _DTYPES), ("compute_dtype", self.compute_dtype, _DTYPES)
        ):  # fmt: skip
            if value not in choices:
                raise DataError(f"{name}={value!r}: expected one of {', '.join(choices)}")
        for name, number, low, high in (
            ("size", self.size, 8, 8192), ("shard_size", self.shard_size, 1, 10**6),
            ("batch_size", self.batch_size, 1, 4096), ("seed", self.seed, 0, 2**31 - 1),
            ("num_classes", 1 if self.num_classes is None else self.num_classes, 1, 2**31 - 1),
        ):  # fmt: skip
            if not low <= number <= high:
                raise DataError(f"{name}={number}: expected {low} to {high}")


class ShardEncoder:
    """The VAE on its device and the images: `encode(shard)` gives the tensors of one shard and what was skipped."""

    def __init__(
        self, source: ImageSource, config: EncodeConfig, device: torch.device, num_threads: int | None = None
    ) -> None:
        from grafting.families.codec import SD_VAE, load_vae, move_vae, scaling_of, vae_hashes

        self.source, self.config, self.device = source, config, device
        self.num_shards = -(-len(source) // config.shard_size)
        if self.num_shards > MAX_SHARDS:
            raise DataError(
                f"{len(source)} images in shards of {config.shard_size} are {self.num_shards} files, the limit is "
                f"{MAX_SHARDS}; give a larger --shard-size"
            )
        self.labelled = bool((source.labels >= 0).any())
        self.num_classes = _num_classes(source, config, self.labelled)
        self.vae = load_vae(config.vae)
        self.scaling, self.shift = scaling_of(self.vae)
        whole, encoder = vae_hashes(self.vae)
        self.vae = move_vae(self.vae, device, getattr(torch, config.compute_dtype))
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if config.size % factor:
            raise DataError(
                f"size={config.size} is no multiple of {factor}, by which this VAE shrinks images; give one that is"
            )
        self.shape = (int(self.vae.config.latent_channels), config.size // factor, config.size // factor)
        self.num_threads = num_threads or min(16, usable_cores())
        self.job: dict[str, Any] = {
            "shape": list(self.shape), "dtype": config.dtype, "flip": config.flip, "num_classes": self.num_classes,
            "class_names": list(source.class_names) if source.class_names else None, "labelled": self.labelled,
            "vae": {
                "source": config.vae or SD_VAE, "sha256": whole, "encoder_sha256": encoder,
                "scaling_factor": self.scaling, "shift_factor": self.shift, "mode": config.mode, "seed": config.seed,
                "compute_dtype": config.compute_dtype, "device": device.type, "batch_size": config.batch_size,
            },
            "images": {"kind": source.kind, "name": source.name, "num": len(source), "sha256": source.fingerprint},
            "preprocessing": preprocessing(config.size), "shard_size": config.shard_size,
        }  # fmt: skip

    def span(self, shard: int) -> range:
        """Numbers of the images of a shard."""
        first = shard * self.config.shard_size
        return range(first, min(first + self.config.shard_size, len(self.source)))

    def num_bytes(self, num_images: int) -> int:
        """Size on disk of that many images, without headers."""
        views = 2 if self.config.flip else 1
        item = getattr(torch, self.config.dtype).itemsize
        return num_images * (views * item * int(np.prod(self.shape)) + 16)

    @torch.no_grad()
    def encode(
        self, shard: int, progress: Progress | None = None
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Tensors `y`, `index`, `x` (and `x_flip`) of a shard, and its skipped images with path and reason."""
        span = self.span(shard)
        names = ("x", "x_flip") if self.config.flip else ("x",)
        stored = {
            name: torch.empty(len(span), *self.shape, dtype=getattr(torch, self.config.dtype))
            for name in names
        }
        kept: list[int] = []
        skipped: list[dict[str, Any]] = []
        with self._computing():
            for index, results in self._decoded(span):
                pixels = np.zeros(
                    (self.config.batch_size, self.config.size, self.config.size, 3), dtype=np.uint8
                )
                good = []
                for place, (number, result) in enumerate(zip(index, results, strict=True)):
                    if isinstance(result, Skipped):
                        skipped.append(
                            {"index": number, "path": self.source.path(number), "reason": result.reason}
                        )
                    else:
                        pixels[place] = result
                        good.append(place)
                if good:
                    for name in names:
                        latents = self._latents(pixels, index, mirrored=name == "x_flip")[good]
                        rows = latents.to(stored[name].dtype)
                        self._check(rows, [index[place] for place in good])
                        stored[name][len(kept) : len(kept) + len(good)] = rows
                kept += [index[place] for place in good]
                if progress:
                    progress(len(index), len(index) - len(good))
        labels = self.source.labels[kept] if self.labelled else np.zeros(len(kept), dtype=np.int64)
        tensors = {
            "y": torch.from_numpy(labels.astype(np.int64)),
            "index": torch.tensor(kept, dtype=torch.int64),
        }
        return tensors | {name: tensor[: len(kept)] for name, tensor in stored.items()}, skipped

    @torch.no_grad()
    def measure(self, num_images: int) -> float:
        """Images per second of a batch of so many, decoding and mirrored copies included, after one to warm up."""
        with self._computing():
            for _ in range(2):
                started = time.perf_counter()
                _, results = next(iter(self._decoded(range(num_images))))
                pixels = np.zeros(
                    (self.config.batch_size, self.config.size, self.config.size, 3), dtype=np.uint8
                )
                for place, result in enumerate(results):
                    if not isinstance(result, Skipped):
                        pixels[place] = result
                for mirrored in (False, True)[: 1 + self.config.flip]:
                    self._latents(pixels, list(range(num_images)), mirrored=mirrored)
        return num_images / (time.perf_counter() - started)

    def _latents(self, pixels: np.ndarray, index: list[int], *, mirrored: bool) -> Tensor:
        """Scaled latents float32 [B, C, h, w] on the CPU; image i's noise is a function of (seed, i)."""
        from grafting.families.codec import posterior

        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        if mirrored:
            x = x.flip(-1)
        mean, deviation = posterior(self.vae, x.contiguous())
        if self.config.mode == "sample":
            numbers = torch.zeros(len(pixels), dtype=torch.int64, device=self.device)
            numbers[: len(index)] = torch.tensor(index, device=self.device)
            purpose = "encode/posterior/flip" if mirrored else "encode/posterior"
            mean = mean + deviation * draws.normal(self.config.seed, purpose, numbers, self.shape)
        return ((mean - self.shift) * self.scaling).cpu()

    def _decoded(self, span: range) -> Iterator[tuple[list[int], list[np.ndarray | Skipped]]]:
        """Batches of image numbers with their pixels or the reason there are none, decoded ahead by threads."""
        size = self.config.batch_size
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode")
        waiting: deque[tuple[list[int], list[Future[np.ndarray | Skipped]]]] = deque()
        try:
            for start in range(span.start, span.stop, size):
                index = list(range(start, min(start + size, span.stop)))
                waiting.append((index, [pool.submit(self._pixels, number) for number in index]))
                if len(waiting) > _AHEAD:
                    numbers, futures = waiting.popleft()
                    yield numbers, [future.result() for future in futures]
            while waiting:
                numbers, futures = waiting.popleft()
                yield numbers, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _pixels(self, index: int) -> np.ndarray | Skipped:
        if self.labelled and self.source.labels[index] < 0:
            return Skipped("the image has no label, others have one")
        content = self.source.read(index)
        return content if isinstance(content, Skipped) else decode_image(content, self.config.size)

    def _check(self, rows: Tensor, index: list[int]) -> None:
        bad = ~torch.isfinite(rows).flatten(1).all(dim=1)
        if bool(bad.any()):
            path = self.source.path(index[int(bad.nonzero()[0])])
            raise DataError(
                f"the latents of {path!r} are not finite (computed in {self.config.compute_dtype}, stored in "
                f"{self.config.dtype}); some VAEs overflow in float16, give --dtype bfloat16 or float32"
            )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """One thread on a CPU, no TF32 and no autotuning on a GPU: the same bytes every time."""
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                yield
        finally:
            torch.set_num_threads(threads)


def _num_classes(source: ImageSource, config: EncodeConfig, labelled: bool) -> int:
    highest = int(source.labels.max()) if labelled else 0
    named = len(source.class_names) if source.class_names else highest + 1
    number = config.num_classes or named
    if highest >= number:
        raise DataError(
            f"{source.name!r} has labels up to {highest}, more than {number} classes; give a larger --num-classes"
        )
    return number

"""Stage 1 the published way, for comparison: teacher activations stored once on disk, then read in every epoch."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from grafting import draws
from grafting.errors import RunError
from grafting.families import Tap
from grafting.training.compute import Compute
from grafting.training.config import DistillConfig
from grafting.training.loop import Batch, Batches, Journal, samples_per_pass
from grafting.training.pupils import Pupil


class Taught(Protocol):
    """What the cache asks of a run of stage 1."""

    config: DistillConfig
    compute: Compute
    journal: Journal
    seed: int
    teacher: nn.Module
    pupils: list[Pupil]
    batches: Batches

    def taps(self, batch: Batch, paths: list[str]) -> dict[str, Tap]:
        """The teacher's taps on one batch."""
        ...


def _stored(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A float16 array in a file. Its disk is taken at once: a write into a hole of a full disk would end the process.

    Raises RunError.
    """
    try:
        array: np.memmap = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise RunError(
            f"can't store activations in {str(path)!r}: {error.strerror or error}; free some disk, lower "
            "cache_samples, or use mode one-pass"
        ) from None
    return array


class ActivationCache:
    """Inputs, outputs and gates of the sites for a fixed set of noised samples, float16, memory-mapped in a folder.

    The folder is made in the journal's, or the system's temporary one, and removed with the object.
    Per sample and site: 2 N D + D values of two bytes.
    """

    def __init__(
        self,
        folder: Path,
        arrays: dict[str, tuple[np.memmap, np.memmap, np.memmap]],
        size: int,
        stage: Taught,
    ):
        self.folder, self.arrays, self.size = folder, arrays, size
        self.seed, self.device = stage.seed, stage.compute.device
        self.groups = {pupil.path for pupil in stage.pupils if pupil.site.layers}
        self.dtype = next(stage.teacher.parameters()).dtype
        self.bytes = sum(array.nbytes for triple in arrays.values() for array in triple)
        self.seconds = 0.0  # that collecting took
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @classmethod
    def collect(cls, stage: Taught, paths: list[str]) -> ActivationCache:
        """One teacher pass over `cache_samples` noised samples. Raises RunError if it would not fit the limit.

        Each of several processes keeps one; the limit is for all of them together.
        """
        config = stage.config
        size = min(config.cache_samples, config.steps * config.batch_size)
        sites = {pupil.path: pupil.site for pupil in stage.pupils}
        per_sample = sum((2 * sites[path].num_tokens + 1) * sites[path].width * 2 for path in paths)
        scratch = stage.journal.scratch() or Path(tempfile.gettempdir())
        copies = stage.compute.world
        needed = per_sample * size * copies
        free = stage.compute.from_main(shutil.disk_usage(scratch).free)  # before any process fills its own
        limit = min(config.cache_limit_gb * 1e9, 0.9 * free)
        if needed > limit:
            raise RunError(
                f"mode cached needs {needed / 1e9:.1f} GB on disk for {size} samples at {len(paths)} sites"
                f"{f' in each of {copies} processes' if copies > 1 else ''}, the limit is {limit / 1e9:.1f} GB; lower "
                "cache_samples, raise cache_limit_gb, or use mode one-pass"
            )
        try:
            folder = Path(tempfile.mkdtemp(dir=scratch, prefix="grafting-cache-"))
        except OSError as error:
            raise RunError(f"can't write {str(scratch)!r}: {error.strerror or error}") from None
        try:
            return cls._fill(stage, paths, folder, size)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @classmethod
    def _fill(cls, stage: Taught, paths: list[str], folder: Path, size: int) -> ActivationCache:
        config = stage.config
        sites = {pupil.path: pupil.site for pupil in stage.pupils}
        arrays = {}
        for number, path in enumerate(paths):
            tokens, width = sites[path].num_tokens, sites[path].width
            shapes = ((size, tokens, width), (size, tokens, width), (size, 1, width))
            triple = [
                _stored(folder / f"{number}-{kind}.npy", shape)
                for kind, shape in zip(("input", "output", "gate"), shapes, strict=True)
            ]
            arrays[path] = (triple[0], triple[1], triple[2])
        started = time.perf_counter()
        cache = cls(folder, arrays, size, stage)
        for rows in torch.arange(size).split(samples_per_pass(config, stage.compute.world)):
            taps = stage.taps(stage.batches.at(rows), paths)
            for path, tap in taps.items():
                gate = tap.gate if tap.gate is not None else torch.ones_like(tap.output[:, :1])
                if tap.cond is not None:  # of a group of blocks: in the place of the gate, which it has not
                    gate = tap.cond[:, None]
                for array, values in zip(arrays[path], (tap.input, tap.output, gate), strict=True):
                    stored = values.half()
                    if not torch.isfinite(stored).all():
                        raise RunError(
                            f"mode cached: activations at {path} do not fit float16; use mode one-pass"
                        )
                    array[rows[0] : rows[-1] + 1] = stored.cpu().numpy()
        cache.seconds = time.perf_counter() - started
        return cache

    def at(self, index: Tensor, paths: list[str]) -> dict[str, Tap]:
        """The taps of a batch of global sample numbers; every epoch visits the stored samples in a new order."""
        rows = torch.empty_like(index)
        for epoch in (index // self.size).unique().tolist():
            if epoch != self._epoch:
                self._epoch, self._order = (
                    epoch,
                    draws.permutation(self.seed, "distill/cache", epoch, self.size),
                )
            chosen = index // self.size == epoch
            rows[chosen] = self._order[index[chosen] % self.size]
        picked = rows.numpy()
        found = {}
        for path in paths:
            x, y, third = (
                torch.from_numpy(array[picked]).to(self.device, self.dtype) for array in self.arrays[path]
            )
            found[path] = Tap(x, y, None, third[:, 0]) if path in self.groups else Tap(x, y, third)
        return found

    def __del__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

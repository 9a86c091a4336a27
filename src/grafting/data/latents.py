"""Latents of a whole data set, memory-mapped from the shards that `graft encode` wrote.

Axes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grafting.data.dataset import Indices
from grafting.data.manifest import MANIFEST, Manifest, Shard, read_manifest
from grafting.data.shards import file_sha256, map_tensors
from grafting.data.stratify import stratified_indices
from grafting.errors import DataError

_MAX_OPEN = 512  # maps kept at a time
_VIEWS = ("x", "x_flip")


class LatentDataset:
    """Latents x [N, C, H, W] with labels y [N] in a folder of shards; nothing but labels is held in memory.

    With mirrored latents every image counts twice: example i and example i + N/2 are the same image, and a subset or
    split always takes both. `batch` gives float32 whatever is stored. Opening checks the manifest and the size and
    header of every file; `verify` checks the hashes. Raises `DataError`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        labels: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        name: str | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.name = name or folder.resolve().name
        self.num_classes = manifest.num_classes
        self._views = _VIEWS if manifest.flip else _VIEWS[:1]
        self._labels = labels  # of all images of the folder
        self._rows = np.arange(manifest.num) if rows is None else rows  # the images of this set
        self._ends = np.cumsum([shard.num for shard in manifest.shards])
        self._maps: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> LatentDataset:
        """Open a folder that `graft encode` finished."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        labels = [_check_shard(folder, shard, manifest) for shard in manifest.shards]
        joined = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
        if len(joined) == 0:
            raise DataError(f"{folder / MANIFEST}: no latents in it; encode the images again")
        if int(joined.min()) < 0 or int(joined.max()) >= manifest.num_classes:
            raise DataError(
                f"{folder}: labels are {joined.min()}..{joined.max()}, expected 0..{manifest.num_classes - 1}; "
                "encode the images again"
            )
        return cls(folder, manifest, joined)

    def __len__(self) -> int:
        return len(self._rows) * len(self._views)

    def __repr__(self) -> str:
        return (
            f"LatentDataset({self.name!r}: {len(self)} x {list(self.shape)}, {self.num_classes} classes, "
            f"stored as {self.manifest.dtype} in {len(self.manifest.shards)} shards)"
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": OrderedDict()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one example."""
        return self.manifest.shape

    @property
    def y(self) -> Tensor:
        """The labels int64 [N]."""
        return torch.from_numpy(np.tile(self._labels[self._rows], len(self._views)))

    @cached_property
    def content_hash(self) -> str:
        """The manifest's hash; of a subset, SHA-256 of that and of the numbers of the images that are in it."""
        if len(self._rows) == self.manifest.num:
            return self.manifest.sha256
        digest = hashlib.sha256(self.manifest.sha256.encode())
        digest.update(self._rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return (x float32 [B, C, H, W], y int64 [B]) of the examples at `indices`, on the CPU."""
        index = torch.as_tensor(indices, dtype=torch.int64).reshape(-1).numpy()
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise DataError(f"{self.name}: index {index.min()}..{index.max()} is outside 0..{len(self) - 1}")
        views, rows = index // len(self._rows), self._rows[index % len(self._rows)]
        shards = np.searchsorted(self._ends, rows, side="right")
        x = torch.empty(len(index), *self.shape)
        for shard, view in {*zip(shards.tolist(), views.tolist(), strict=True)}:
            chosen = np.flatnonzero((shards == shard) & (views == view))
            first = int(self._ends[shard]) - self.manifest.shards[shard].num
            stored = self._map(shard)[self._views[view]][torch.from_numpy(rows[chosen] - first)]
            x[torch.from_numpy(chosen)] = stored.to(torch.float32)
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"{self.folder}: latents that are not finite; encode the images again")
        return x, torch.from_numpy(self._labels[rows])

    def subset(self, fraction: float, seed: int = 0) -> LatentDataset:
        """Return a stratified `fraction` (0 < fraction <= 1, at least one image), in the original order."""
        if not 0.0 < fraction <= 1.0:
            raise DataError(f"{self.name}: fraction must be in (0, 1], got {fraction}")
        total = max(1, round(fraction * len(self._rows)))
        return self._take(total, seed, "subset", f"{self.name}[{fraction:g}, seed {seed}]")[0]

    def split(self, num_validation: int, seed: int = 0) -> tuple[LatentDataset, LatentDataset]:
        """Hold out `num_validation` examples, stratified: returns (training part, validation part).

        With mirrored latents, half as many images (rounded up): no image is on both sides.
        """
        images = -(-num_validation // len(self._views))
        if not 1 <= images < len(self._rows):
            raise DataError(
                f"{self.name}: cannot hold out {num_validation} of {len(self)} examples; "
                f"ask for 1 to {len(self) - len(self._views)}"
            )
        held, kept = self._take(images, seed, "validation", f"{self.name}[validation]")
        kept.name = f"{self.name}[train]"
        return kept, held

    def verify(self) -> None:
        """Read every shard and compare its hash with the manifest's; `DataError` names the first that differs."""
        for shard in self.manifest.shards:
            if file_sha256(self.folder / shard.file) != shard.sha256:
                raise DataError(
                    f"{self.folder / shard.file} is damaged: its hash is not the recorded one; run graft encode "
                    "on the same images and folder again, it makes that shard anew"
                )

    def _take(self, total: int, seed: int, purpose: str, name: str) -> tuple[LatentDataset, LatentDataset]:
        """`total` of the images, stratified, as a set of that name, and the rest."""
        chosen = stratified_indices(self._labels[self._rows], total, seed=seed, purpose=purpose)
        rest = np.setdiff1d(np.arange(len(self._rows)), chosen, assume_unique=True)
        taken, left = (
            LatentDataset(self.folder, self.manifest, self._labels, rows=self._rows[part], name=name)
            for part in (chosen, rest)
        )
        return taken, left

    def _map(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._maps:
            path = self.folder / self.manifest.shards[shard].file
            self._maps[shard] = map_tensors(path)
            if len(self._maps) > _MAX_OPEN:
                self._maps.popitem(last=False)
        self._maps.move_to_end(shard)
        return self._maps[shard]


def is_latents(folder: str | Path) -> bool:
    """Say whether `folder` holds latents that `graft encode` finished."""
    return (Path(folder) / MANIFEST).is_file()


def _check_shard(folder: Path, shard: Shard, manifest: Manifest) -> np.ndarray:
    """Size, header and shapes of one shard against the manifest; returns its labels [n]."""
    path = folder / shard.file
    again = "run graft encode on the same images and folder again, it makes that shard anew"
    if not path.is_file():
        raise DataError(f"{folder}: the shard {shard.file} is missing; {again}")
    size = path.stat().st_size
    if size != shard.size:
        raise DataError(f"{path} has {size} bytes, the manifest says {shard.size}; {again}")
    tensors = map_tensors(path)
    wanted = {"y": (shard.num,), "index": (shard.num,), "x": (shard.num, *manifest.shape)}
    if manifest.flip:
        wanted["x_flip"] = wanted["x"]
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = getattr(torch, manifest.dtype)
    types = {name: dtype if name in _VIEWS else torch.int64 for name in wanted}
    if found != wanted or any(tensors[name].dtype != types[name] for name in wanted):
        raise DataError(f"{path} holds {found}, the manifest says {wanted} of {manifest.dtype}; {again}")
    return tensors["y"].numpy().copy()

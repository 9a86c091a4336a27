"""Labelled images or latents held in memory, and the small interface that training asks of any data source.

Axes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from grafting.data.stratify import stratified_indices
from grafting.errors import DataError

Indices = Sequence[int] | np.ndarray | Tensor
_CHUNK = 4096
_PIXEL_CHANNELS = (1, 3)  # other numbers are latents
_NO_PIXEL = 4.0  # pixels in [-1, 1], however they were normalised, stay below


class DataSource(Protocol):
    """What training needs of data: examples by index, and a name and hash that say what they are.

    A batch is x [B, C, H, W] and what it is conditioned on: class numbers [B], or a `Caption`.
    """

    @property
    def name(self) -> str: ...

    @property
    def content_hash(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> tuple[Tensor, Any]: ...

    def subset(self, fraction: float, seed: int = 0) -> DataSource: ...

    def split(self, num_validation: int, seed: int = 0) -> tuple[DataSource, DataSource]: ...


class ImageLabelDataset:
    """Images or latents x [N, C, H, W] with labels y [N], in memory.

    `x` may be uint8 (grey levels, read as `x / 127.5 - 1`) or floating (taken as it is: pixels, which have one or three
    channels, in [-1, 1]); `batch` and `x` always give float32. Raises `DataError` for another shape or type, values
    that are not finite, floating pixels that look like 0..255, labels outside `0..num_classes - 1`, or no examples.
    `num_classes` defaults to the largest label plus one.
    """

    def __init__(self, x: Tensor, y: Tensor, *, name: str = "data", num_classes: int | None = None) -> None:
        x, y = torch.as_tensor(x).detach().cpu(), torch.as_tensor(y).detach().cpu()
        if x.ndim != 4 or 0 in x.shape:
            raise DataError(f"{name}: images must be [N, C, H, W] with N >= 1, got {list(x.shape)}")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise DataError(f"{name}: images must be uint8 or floating point, got {_dtype(x)}")
        if y.ndim != 1 or len(y) != len(x):
            raise DataError(f"{name}: labels must be [{len(x)}], one per image, got {list(y.shape)}")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise DataError(f"{name}: labels must be integers, got {_dtype(y)}")
        y = y.to(torch.int64)
        low, high = int(y.min()), int(y.max())
        classes = high + 1 if num_classes is None else num_classes
        if low < 0 or high >= classes:
            raise DataError(f"{name}: labels must be 0..{classes - 1}, got {low}..{high}")
        _check_finite(x, name)
        _check_pixels(x, name)
        self.name = name
        self.num_classes = classes
        self._x = x.contiguous()
        self.y = y.contiguous()

    def __len__(self) -> int:
        return len(self._x)

    def __repr__(self) -> str:
        return (
            f"ImageLabelDataset({self.name!r}: {len(self)} x {list(self.shape)}, {self.num_classes} classes, "
            f"stored as {_dtype(self._x)})"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one example."""
        return (self._x.shape[1], self._x.shape[2], self._x.shape[3])

    @property
    def x(self) -> Tensor:
        """All examples as float32 [N, C, H, W]; converted at each access unless stored so."""
        return _to_float(self._x)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of type, shape and bytes of the stored examples and labels; the name is not part of it."""
        digest = hashlib.sha256(f"{_dtype(self._x)} {tuple(self._x.shape)} {self.num_classes}".encode())
        for tensor in (self._x, self.y):
            for start in range(0, len(tensor), _CHUNK):
                digest.update(tensor[start : start + _CHUNK].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Return (x float32 [B, C, H, W], y int64 [B]) of the examples at `indices`, on the CPU."""
        index = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise DataError(
                f"{self.name}: index {int(index.min())}..{int(index.max())} is outside 0..{len(self) - 1}"
            )
        return _to_float(self._x[index]), self.y[index]

    def subset(self, fraction: float, seed: int = 0) -> ImageLabelDataset:
        """Return a stratified `fraction` (0 < fraction <= 1, at least one example), in the original order."""
        if not 0.0 < fraction <= 1.0:
            raise DataError(f"{self.name}: fraction must be in (0, 1], got {fraction}")
        total = max(1, round(fraction * len(self)))
        chosen = stratified_indices(self.y.numpy(), total, seed=seed, purpose="subset")
        return self._take(chosen, f"{self.name}[{fraction:g}, seed {seed}]")

    def split(self, num_validation: int, seed: int = 0) -> tuple[ImageLabelDataset, ImageLabelDataset]:
        """Hold out `num_validation` examples, stratified: returns (training part, validation part)."""
        if not 1 <= num_validation < len(self):
            raise DataError(
                f"{self.name}: cannot hold out {num_validation} of {len(self)} examples; "
                f"ask for 1 to {len(self) - 1}"
            )
        held = stratified_indices(self.y.numpy(), num_validation, seed=seed, purpose="validation")
        kept = np.setdiff1d(np.arange(len(self)), held, assume_unique=True)
        return self._take(kept, f"{self.name}[train]"), self._take(held, f"{self.name}[validation]")

    def check_against(self, channels: int, size: int, num_classes: int) -> None:
        """Raise `DataError` unless a model of these channels, latent size and classes can take this data."""
        check_against(self, channels, size, num_classes)

    def _take(self, indices: np.ndarray, name: str) -> ImageLabelDataset:
        index, part = (
            torch.from_numpy(indices),
            copy.copy(self),
        )  # what was checked of the whole holds for a part
        part.__dict__.pop("content_hash", None)
        part._x, part.y, part.name = self._x[index], self.y[index], name
        return part


def check_against(data: DataSource, channels: int, size: int, num_classes: int) -> None:
    """Raise `DataError` unless `data` is [channels, size, size] with at most `num_classes` classes."""
    expected = (channels, size, size)
    if data.shape != expected:
        raise DataError(
            f"data {data.name!r} has examples of {list(data.shape)} but the model takes {list(expected)} "
            "(channels, height, width); use data of that shape, or encode the images first"
        )
    if data.num_classes > num_classes:
        raise DataError(
            f"data {data.name!r} has {data.num_classes} classes but the model knows {num_classes}; "
            "drop the classes above that, or use a model that has them"
        )


def _to_float(x: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(127.5).sub_(1.0)
    return x.to(torch.float32)


def _check_finite(x: Tensor, name: str) -> None:
    if x.dtype == torch.uint8:
        return
    for start in range(0, len(x), _CHUNK):
        bad = ~torch.isfinite(x[start : start + _CHUNK]).flatten(1).all(dim=1)
        if bool(bad.any()):
            first = start + int(bad.nonzero()[0])
            raise DataError(f"{name}: example {first} has values that are not finite; remove or repair it")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _check_pixels(x: Tensor, name: str) -> None:
    """Refuse floating pixels whose values are grey levels: training on them fails in silence."""
    if not x.is_floating_point() or x.shape[1] not in _PIXEL_CHANNELS:
        return
    ends = [torch.aminmax(x[start : start + _CHUNK].float()) for start in range(0, len(x), _CHUNK)]
    low, high = min(float(end.min) for end in ends), max(float(end.max) for end in ends)
    if low >= 0.0 and high > _NO_PIXEL:
        raise DataError(
            f"{name}: floating-point images of {x.shape[1]} channel{'s' if x.shape[1] > 1 else ''} with values "
            f"{low:g} to {high:g}; pixels are expected in [-1, 1]: give uint8, or x / 127.5 - 1"
        )

"""Fashion-MNIST (Zalando Research, MIT licence): the full IDX files, and the stratified 10 % shipped here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grafting.assets import asset_path
from grafting.data.idx import read_idx
from grafting.data.npz import NpzReader
from grafting.errors import DataError

NUM_CLASSES = 10
CLASS_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SUBSET_SEED = 0
SUBSET_PURPOSE = "fashion-10"
SUBSET_ASSET = "fashion_10.npz"
_PREFIX = {"train": "train", "test": "t10k"}
SPLITS = tuple(_PREFIX)


def pad_to_32(images: np.ndarray) -> np.ndarray:
    """Pad uint8 images [N, 28, 28] by 2 black pixels a side: uint8 [N, 1, 32, 32]."""
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(
            f"Fashion-MNIST images must be uint8 [N, 28, 28], got {images.dtype} {list(images.shape)}"
        )
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]


def to_pixels(images: np.ndarray) -> Tensor:
    """Map uint8 images [N, 28, 28] to float32 [N, 1, 32, 32] in [-1, 1]; the padding is black, -1."""
    return torch.from_numpy(pad_to_32(images)).float().div_(127.5).sub_(1.0)


def has_idx_files(folder: str | Path, split: str = "train") -> bool:
    """Say whether `folder` holds the image file of `split`, gzipped or raw."""
    return _find(Path(folder), f"{_PREFIX[split]}-images-idx3-ubyte") is not None


def load_full(folder: str | Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Read a split ("train" or "test") from its IDX files: uint8 images [N, 28, 28] and int64 labels [N].

    Raises `DataError` for a missing or damaged file, another image size, or labels outside 0..9.
    """
    if split not in _PREFIX:
        raise DataError(f"unknown split {split!r} of Fashion-MNIST; use one of: {', '.join(SPLITS)}")
    arrays = []
    for stem in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        name = f"{_PREFIX[split]}-{stem}"
        path = _find(Path(folder), name)
        if path is None:
            raise DataError(f"no {name}.gz (or unzipped {name}) in {folder}; download Fashion-MNIST into it")
        arrays.append(read_idx(path))
    images, labels = arrays[0], arrays[1].astype(np.int64)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{folder}: images {list(images.shape)} and labels {list(labels.shape)} of {split} do not fit; "
            "expected [N, 28, 28] and [N]"
        )
    if len(labels) == 0 or labels.max() >= NUM_CLASSES:
        raise DataError(
            f"{folder}: labels of {split} must be 0..9 and at least one, got {len(labels)} labels"
        )
    return images, labels


def packaged_subset() -> tuple[np.ndarray, np.ndarray]:
    """Return the shipped stratified 10 % of the training set: uint8 [6000, 28, 28], int64 [6000].

    It is `stratified_indices(labels, 6000, seed=SUBSET_SEED, purpose=SUBSET_PURPOSE)` of the 60,000.
    """
    archive = NpzReader(asset_path(SUBSET_ASSET))
    return archive.read("arr_0"), archive.read("arr_1").astype(np.int64)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)

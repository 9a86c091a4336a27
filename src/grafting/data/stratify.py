"""Stratified draws: each class in its proportion, a function of (seed, purpose) and the labels alone."""

from __future__ import annotations

import numpy as np

from grafting import draws
from grafting.errors import DataError


def apportion(counts: np.ndarray, total: int) -> np.ndarray:
    """Share `total` over classes in proportion to `counts`: largest remainder, ties to the first."""
    num_items = int(counts.sum())
    shares = counts.astype(np.int64) * total // num_items
    remainders = counts.astype(np.int64) * total % num_items
    missing = total - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return shares


def stratified_indices(labels: np.ndarray, total: int, *, seed: int, purpose: str) -> np.ndarray:
    """Return `total` ascending indices into `labels` [N], each class in its proportion.

    A larger draw of the same seed and purpose contains the smaller one, up to the rounding of a class.
    Raises `DataError` when `total` is not between 1 and N.
    """
    if not 1 <= total <= len(labels):
        raise DataError(f"cannot draw {total} of {len(labels)} examples; ask for 1 to {len(labels)}")
    order = draws.permutation(seed, purpose, 0, len(labels)).numpy()
    labels_in_order = labels[order]
    classes, counts = np.unique(labels, return_counts=True)
    chosen = [
        order[np.flatnonzero(labels_in_order == label)[:share]]
        for label, share in zip(classes, apportion(counts, total), strict=True)
    ]
    return np.sort(np.concatenate(chosen))

"""Stratified draws that depend on (seed, purpose, index) alone: no generator state, no library version."""

from __future__ import annotations

import hashlib

import numpy as np

from grafting.errors import DataError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw_keys(seed: int, purpose: str, indices: np.ndarray) -> np.ndarray:
    """Return one pseudo-random uint64 per index: SplitMix64 (Steele 2014) of a hashed seed and purpose."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    offset = np.uint64(int.from_bytes(digest[:8], "little"))
    with np.errstate(over="ignore"):
        z = offset + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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
    classes, counts = np.unique(labels, return_counts=True)
    keys = draw_keys(seed, purpose, np.arange(len(labels)))
    chosen = []
    for label, share in zip(classes, apportion(counts, total), strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(keys[members], kind="stable")[:share]])
    return np.sort(np.concatenate(chosen))

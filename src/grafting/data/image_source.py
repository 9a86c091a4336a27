"""What every source of images is: a fixed sequence of encoded images with names and labels.

Index i of a source is the same image as long as its fingerprint is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from grafting.data.pixels import Skipped


class ImageSource(Protocol):
    """Images by index, in an order that does not change."""

    kind: str  # "folder", "webdataset", "parquet" or "hub"
    name: str
    labels: np.ndarray  # int64 [N]; -1 where an image has none
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """What the log calls an image."""
        ...

    def read(self, index: int) -> bytes | Skipped:
        """The bytes of the image file. Raises DataError where the storage itself fails."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and labels, in order."""
        ...


def fingerprint(lines: Iterable[str]) -> str:
    """SHA-256 (hex) of lines of text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()

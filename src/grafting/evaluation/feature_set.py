"""What a feature network is, and what it makes of images.

Axes: N images, F pooled features, G spatial features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from grafting.errors import DataError


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images: `pool` [N, F] float32; `spatial` [N, G] and `logits` [N, K] if any."""

    pool: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None


class FeatureNetwork(Protocol):
    """What `evaluate` asks of a feature network.

    `name` and `weights_hash` (SHA-256) go into the protocol. `num_label_classes` says for how many labels the
    logits are a classifier of the samples' own classes; None if they are not (then no label accuracy). One that has
    `labels_are_prompts` set gives `alignment` instead: the classes are those of the prompts, and unequally many.
    """

    @property
    def name(self) -> str: ...

    @property
    def weights_hash(self) -> str: ...

    @property
    def num_label_classes(self) -> int | None: ...

    def extract(
        self, images: np.ndarray, batch_size: int = 256, device: str | torch.device = "cpu"
    ) -> FeatureSet:
        """Return the features of uint8 images [N, H, W, C]."""
        ...


def batches(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut images [N, ...] into a list of views of at most `batch_size`."""
    if batch_size < 1:
        raise DataError(f"batch size must be at least 1, got {batch_size}")
    return [images[start : start + batch_size] for start in range(0, len(images), batch_size)]

"""What the tests of evaluation share: images of known classes, a protocol, a generator."""

from __future__ import annotations

import numpy as np

from grafting.data import load_dataset
from grafting.evaluation import to_uint8

PROTOCOL = {
    "steps": 10,
    "sampler": "dpm++",
    "guidance": 1.5,
    "seed": 0,
    "labels": "i mod classes",
    "num_samples": 120,
    "model": "teacher",
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def fashion_images(start: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_dataset("fashion-10").batch(range(start, start + num))
    return to_uint8(x), y.numpy()

"""Samples on a page: the same images of several files side by side, as data URIs.

Axes: N samples, H W height and width, C channels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grafting.errors import GraftError

MAX_SIDE = 128  # pixels of a shown image; larger ones are shrunk
_CRISP_SIDE = 64  # up to here an image is enlarged by whole pixels and kept without loss
_READ_BYTES = 1 << 26
_GAP = 2


@dataclass(frozen=True)
class Samples:
    """The first images of a sample file: uint8 [N, H, W, C], labels [N] or None, the file's protocol and size."""

    images: np.ndarray
    labels: np.ndarray | None
    protocol: Mapping[str, Any]
    total: int


def read_samples(path: Path) -> Samples:
    """Read the first images of a sample file (64 MiB at most). Raises GraftError."""
    from grafting.evaluation.samples import SampleFile

    file = SampleFile.open(path)
    size = int(np.prod(file.image_shape))
    images = next(file.images(max(1, min(len(file), _READ_BYTES // size))))
    if images.shape[3] not in (1, 3):
        raise GraftError(f"{path.name}: images have {images.shape[3]} channels; a page shows 1 or 3")
    labels = None if file.labels is None else file.labels[: len(images)]
    return Samples(images, labels, file.protocol, len(file))


def same_noise(files: Sequence[Samples]) -> list[str]:
    """The fields of the protocols that keep equal positions from sharing noise and label; empty if they do."""
    fields = ("seed", "steps", "sampler", "guidance", "labels")
    first = files[0]
    found = [
        name for name in fields if any(file.protocol.get(name) != first.protocol.get(name) for file in files)
    ]
    if any(file.images.shape[1:] != first.images.shape[1:] for file in files):
        found.append("image size")
    count = min(len(file.images) for file in files)
    labels = [None if file.labels is None else file.labels[:count].tolist() for file in files]
    if "labels" not in found and any(given != labels[0] for given in labels):
        found.append("labels")
    return found


def by_class(
    labels: np.ndarray | None, count: int, *, classes: int = 10, each: int = 8
) -> list[tuple[int | None, list[int]]]:
    """Positions to show: `each` of the first `classes` classes, or runs of `each` where classes have too few.

    Returns [(class or None, positions)].
    """
    if labels is not None:
        known = sorted({int(label) for label in labels[:count]})[:classes]
        groups = [(label, np.flatnonzero(labels[:count] == label)[:each].tolist()) for label in known]
        if groups and min(len(positions) for _, positions in groups) >= min(4, each):
            return [(label, positions) for label, positions in groups]
    end = min(count, 3 * each)
    return [(None, list(range(start, min(start + each, end)))) for start in range(0, end, each)]


def strip(images: np.ndarray) -> tuple[str, int, int]:
    """Images uint8 [N, H, W, C] in one row: a data URI, and the width and height to show it at, in CSS pixels."""
    from PIL import Image

    count, height, width, channels = images.shape
    shrink = min(1.0, MAX_SIDE / max(height, width))
    h, w = max(1, round(height * shrink)), max(1, round(width * shrink))
    crisp = max(h, w) <= _CRISP_SIDE
    mode = "RGB" if not crisp else "LA" if channels == 1 else "RGBA"
    sheet = Image.new(mode, (count * (w + _GAP) - _GAP, h), (128, 128, 128) if not crisp else None)
    for number, image in enumerate(images):
        tile = Image.fromarray(image[..., 0] if channels == 1 else image).convert(mode)
        if shrink < 1:
            tile = tile.resize((w, h), Image.Resampling.LANCZOS)
        sheet.paste(tile, (number * (w + _GAP), 0))
    out = io.BytesIO()
    if crisp:
        sheet.save(out, "PNG", optimize=True)
    else:
        sheet.save(out, "JPEG", quality=88)
    kind = "png" if crisp else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
    scale = max(1, 64 // max(h, w))
    return uri, sheet.width * scale, sheet.height * scale


def pair_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of equal positions of two uint8 arrays [N, H, W, C], in grey levels of 255."""
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())

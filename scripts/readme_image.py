"""Make docs/images/demo.png from a finished demo run: the teacher's samples above, the student's below.

python scripts/readme_image.py runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from grafting.evaluation import SampleFile

ROWS, COLUMNS, SCALE, GAP = 2, 16, 2, 10


def strip(path: Path) -> np.ndarray:
    """The first ROWS x COLUMNS images of a sample file as one grey sheet, enlarged."""
    images = next(iter(SampleFile.open(path).images(ROWS * COLUMNS)))[..., 0]
    height, width = images.shape[1:]
    sheet = images.reshape(ROWS, COLUMNS, height, width).transpose(0, 2, 1, 3)
    return np.kron(sheet.reshape(ROWS * height, COLUMNS * width), np.ones((SCALE, SCALE), dtype=np.uint8))


def main() -> None:
    run = Path(sys.argv[1])
    teacher, student = (strip(run / "samples" / f"{who}.npz") for who in ("teacher", "student"))
    gap = np.full((GAP, teacher.shape[1]), 255, dtype=np.uint8)
    target = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([teacher, gap, student])).save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main()

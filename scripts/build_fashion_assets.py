"""Build the packaged Fashion-MNIST files from the full data set.

    python scripts/build_fashion_assets.py subset --data FOLDER
    python scripts/build_fashion_assets.py reference --data FOLDER

`subset` writes the stratified 10 % of the training images; `reference` writes the statistics of all of them
under the packaged classifier (train that first: scripts/train_classifier.py).
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np

from grafting.data.fashion import SUBSET_ASSET, SUBSET_PURPOSE, SUBSET_SEED, load_full
from grafting.data.stratify import stratified_indices

ASSETS = Path(__file__).resolve().parents[1] / "src" / "grafting" / "assets"


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write a compressed `.npz` whose bytes depend on the arrays alone (no time stamps)."""
    with zipfile.ZipFile(path, "w", compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, buffer.getvalue())
    print(f"wrote {path.name}: {path.stat().st_size / 1e6:.2f} MB")


def build_subset(data: Path) -> None:
    images, labels = load_full(data, "train")
    chosen = stratified_indices(labels, len(labels) // 10, seed=SUBSET_SEED, purpose=SUBSET_PURPOSE)
    save_npz(ASSETS / SUBSET_ASSET, arr_0=images[chosen], arr_1=labels[chosen].astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the packaged Fashion-MNIST files.")
    parser.add_argument("what", choices=["subset", "reference"])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    arguments = parser.parse_args()
    if arguments.what == "subset":
        build_subset(arguments.data)
    else:
        from grafting.evaluation.reference import build_reference

        save_npz(ASSETS / "fashion_train_reference.npz", **build_reference(arguments.data))


if __name__ == "__main__":
    main()

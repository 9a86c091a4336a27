"""The packaged classifier of Fashion-MNIST, made by scripts/train_classifier.py."""

from __future__ import annotations

from pathlib import Path

from grafting.assets import asset_path
from grafting.evaluation.classifier import NUM_FEATURES, ImageClassifier, load_weights

ASSET = "fashion_classifier.safetensors"
NUM_CLASSES = 10


class FashionClassifier(ImageClassifier):
    """Map images [N, 1, 32, 32] in [-1, 1] to (features [N, 128], logits [N, 10])."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, NUM_FEATURES), dropout: float = 0.3) -> None:
        super().__init__(1, NUM_CLASSES, widths, dropout)


def load_classifier(path: str | Path | None = None) -> tuple[FashionClassifier, str]:
    """Return the classifier in eval mode, float32 on the CPU, and the SHA-256 of its weight file.

    `path` is a safetensors file of scripts/train_classifier.py, by default the packaged one.
    Raises `CheckpointError` for a file that is missing, damaged or of another network.
    """
    file = asset_path(ASSET) if path is None else Path(path)
    return load_weights(
        FashionClassifier(), file, "a Fashion-MNIST classifier", "scripts/train_classifier.py"
    )

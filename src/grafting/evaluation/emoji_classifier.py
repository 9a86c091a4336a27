"""The packaged classifier of emoji by their group, made by scripts/train_emoji_classifier.py."""

from __future__ import annotations

from pathlib import Path

from grafting.assets import asset_path
from grafting.evaluation.classifier import ImageClassifier, load_weights

ASSET = "emoji_classifier.safetensors"
# As the emoji standard has them, in its order.
GROUPS = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects", "Symbols", "Flags",
)  # fmt: skip


class EmojiClassifier(ImageClassifier):
    """Map images [N, 3, 32, 32] in [-1, 1] to (features [N, 128], logits [N, 9] of `GROUPS`)."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__(3, len(GROUPS), dropout=dropout)


def load_emoji_classifier(path: str | Path | None = None) -> tuple[EmojiClassifier, str]:
    """Return the classifier in eval mode, float32 on the CPU, and the SHA-256 of its weight file.

    `path` is a safetensors file of scripts/train_emoji_classifier.py, by default the packaged one.
    Raises `CheckpointError` for a file that is missing, damaged or of another network.
    """
    file = asset_path(ASSET) if path is None else Path(path)
    return load_weights(EmojiClassifier(), file, "an emoji classifier", "scripts/train_emoji_classifier.py")

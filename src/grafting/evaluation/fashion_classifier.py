"""A small convolutional classifier of Fashion-MNIST: features for the Frechet distance, logits for labels.

The features are spatial means of smooth (SiLU) activations, divided by one constant so that they have unit
variance on average over the training set. Made by scripts/train_classifier.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from grafting.assets import asset_path
from grafting.errors import CheckpointError

ASSET = "fashion_classifier.safetensors"
NUM_FEATURES = 128
NUM_CLASSES = 10


class FashionClassifier(nn.Module):
    """Map images [N, 1, 32, 32] in [-1, 1] to (features [N, 128], logits [N, 10])."""

    feature_scale: Tensor

    def __init__(self, widths: tuple[int, int, int] = (32, 64, NUM_FEATURES), dropout: float = 0.3) -> None:
        super().__init__()
        first, second, third = widths
        self.body = nn.Sequential(
            _conv(1, first, kernel=4, stride=2),  # [N, 32, 16, 16]
            _conv(first, second),
            _conv(second, second),
            _conv(second, third, stride=2),  # [N, 128, 8, 8]
            _Residual(third),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(third, NUM_CLASSES)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.body(x).mean(dim=(2, 3))  # [N, 128]
        return pooled / self.feature_scale, self.head(self.dropout(pooled))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _conv(num_in: int, num_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out), nn.SiLU())


def load_classifier(path: str | Path | None = None) -> tuple[FashionClassifier, str]:
    """Return the classifier in eval mode, float32 on the CPU, and the SHA-256 of its weight file.

    `path` is a safetensors file of scripts/train_classifier.py, by default the packaged one.
    Raises `CheckpointError` for a file that is missing, damaged or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = asset_path(ASSET) if path is None else Path(path)
    model = FashionClassifier()
    try:
        data = file.read_bytes()
        model.load_state_dict({name: tensor.float() for name, tensor in load(data).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} is not a Fashion-MNIST classifier of this package ({reason}); "
            "make one with scripts/train_classifier.py"
        ) from error
    return model.eval().requires_grad_(False), hashlib.sha256(data).hexdigest()

"""A small convolutional classifier of 32x32 images: features for the Frechet distance, logits for labels.

The features are spatial means of smooth (SiLU) activations, divided by one constant so that they have unit
variance on average over the training set.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from grafting.errors import CheckpointError

NUM_FEATURES = 128


class ImageClassifier(nn.Module):
    """Map images [N, C, 32, 32] in [-1, 1] to (features [N, 128], logits [N, K])."""

    feature_scale: Tensor

    def __init__(
        self, num_channels: int, num_classes: int, widths: tuple[int, int, int] = (32, 64, NUM_FEATURES),
        dropout: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        first, second, third = widths
        self.body = nn.Sequential(
            _conv(num_channels, first, kernel=4, stride=2),  # [N, 32, 16, 16]
            _conv(first, second),
            _conv(second, second),
            _conv(second, third, stride=2),  # [N, 128, 8, 8]
            _Residual(third),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(third, num_classes)
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


Classifier = TypeVar("Classifier", bound=ImageClassifier)


def load_weights(model: Classifier, file: Path, what: str, script: str) -> tuple[Classifier, str]:
    """`model` with the weights of a safetensors file, in eval mode, float32 on the CPU; and the file's SHA-256.

    what, script: what such a file is and what makes one, for the message. Raises `CheckpointError` for a file that is
    missing, damaged or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = file.read_bytes()
        model.load_state_dict({name: tensor.float() for name, tensor in load(data).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} is not {what} of this package ({reason}); make one with {script}"
        ) from error
    return model.eval().requires_grad_(False), hashlib.sha256(data).hexdigest()

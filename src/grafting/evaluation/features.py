"""Feature networks by name: what turns images into the vectors that the measures compare.

Axes: N images, F pooled features, G spatial features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from grafting.errors import DataError, GraftError
from grafting.evaluation.feature_set import FeatureNetwork, FeatureSet, batches

if TYPE_CHECKING:
    from grafting.evaluation.classifier import ImageClassifier


Factory = Callable[[str | None], FeatureNetwork]
_FACTORIES: dict[str, Factory] = {}


def register_features(name: str, factory: Factory) -> None:
    """Make `factory(argument)` known under `name`; `argument` is what follows in `name:argument`."""
    if name in _FACTORIES:
        raise GraftError(f"feature network {name!r} is registered already; choose another name")
    _FACTORIES[name] = factory


def names() -> list[str]:
    """Names of the registered feature networks."""
    return sorted(_FACTORIES)


def load_features(spec: str) -> FeatureNetwork:
    """Return the feature network of `spec`: `fashion`, `emoji`, `inception:WEIGHTS`, another registered one.

    Raises `GraftError` for an unknown name, and `CheckpointError` for weights that do not fit.
    """
    name, _, argument = spec.partition(":")
    if name not in _FACTORIES:
        raise GraftError(f"unknown feature network {name!r}; known are: {', '.join(names())}")
    return _FACTORIES[name](argument or None)


class FashionFeatures:
    """The packaged classifier: 128 features, 10 logits; images [N, 32, 32, 1] or [N, 28, 28, 1]."""

    num_label_classes: int | None = 10

    def __init__(self, path: str | Path | None = None) -> None:
        from grafting.evaluation.fashion_classifier import load_classifier

        self._model, self.weights_hash = load_classifier(path)
        self.name = "fashion" if path is None else f"fashion:{Path(path).name}"

    def extract(
        self, images: np.ndarray, batch_size: int = 256, device: str | torch.device = "cpu"
    ) -> FeatureSet:
        """Return pooled features [N, 128] and logits [N, 10] of uint8 images."""
        _check_images(images, ((32, 32, 1), (28, 28, 1)), "fashion")
        border = (32 - images.shape[1]) // 2
        images = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
        return _classified(self._model, images, batch_size, device)


class EmojiFeatures:
    """The packaged classifier of emoji by their group: 128 features, 9 logits; images [N, 32, 32, 3]."""

    num_label_classes: int | None = 9
    labels_are_prompts = True

    def __init__(self, path: str | Path | None = None) -> None:
        from grafting.evaluation.emoji_classifier import load_emoji_classifier

        self._model, self.weights_hash = load_emoji_classifier(path)
        self.name = "emoji" if path is None else f"emoji:{Path(path).name}"

    def extract(
        self, images: np.ndarray, batch_size: int = 256, device: str | torch.device = "cpu"
    ) -> FeatureSet:
        """Return pooled features [N, 128] and logits [N, 9] of uint8 images."""
        _check_images(images, ((32, 32, 3),), "emoji")
        return _classified(self._model, images, batch_size, device)


def _check_images(images: np.ndarray, shapes: tuple[tuple[int, int, int], ...], what: str) -> None:
    if images.dtype != np.uint8 or images.shape[1:] not in shapes:
        raise DataError(
            f"{what} features take uint8 [N, {', '.join(map(str, shapes[0]))}], got {images.dtype} "
            f"{list(images.shape)}; choose other features for other images"
        )


@torch.inference_mode()
def _classified(
    model: ImageClassifier, images: np.ndarray, batch_size: int, device: str | torch.device
) -> FeatureSet:
    model = model.to(device)
    pool, logits = [], []
    for batch in batches(images, batch_size):
        x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(device)
        features, scores = model(x.float() / 127.5 - 1.0)
        pool.append(features.cpu().numpy())
        logits.append(scores.cpu().numpy())
    return FeatureSet(np.concatenate(pool), logits=np.concatenate(logits))


def _inception(path: str | None) -> FeatureNetwork:
    from grafting.evaluation.inception import InceptionFeatures

    if path is None:
        raise DataError(
            "inception features need a weight file: give inception:PATH, with the public FID weights "
            "(pt_inception-2015-12-05) as .pth or .safetensors"
        )
    return InceptionFeatures(path)


register_features("fashion", FashionFeatures)
register_features("emoji", EmojiFeatures)
register_features("inception", _inception)

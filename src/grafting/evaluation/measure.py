"""`evaluate`: all measures of one sample file against one reference, and the protocol they belong to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grafting.errors import DataError
from grafting.evaluation.feature_set import FeatureNetwork
from grafting.evaluation.features import load_features
from grafting.evaluation.metrics import (
    balanced_accuracy,
    frechet_distance,
    inception_score,
    label_accuracy,
    precision_recall,
)
from grafting.evaluation.reference import FASHION_TRAIN, TEACHER, Progress, extract_all, load_reference
from grafting.evaluation.samples import SampleFile

NUM_NEIGHBOURS = 3
SCORE_SPLIT_SIZE = 5000  # images per part of the inception score, as the ADM evaluator has it
_SAMPLING_FIELDS = ("steps", "sampler", "guidance", "seed", "labels")
_FASHION_SHAPES = ((32, 32, 1), (28, 28, 1))


def evaluate(
    samples: str | Path | SampleFile,
    reference: str | Path = FASHION_TRAIN,
    features: str | FeatureNetwork = "auto",
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a sample file; returns JSON types: {"metrics": {name: float}, "protocol": {...}}.

    Metrics: `fd` (Frechet distance; called `fid` under inception features, and only there), `sfd` / `sfid`
    when the network has spatial features, `precision` and `recall` (k = 3), `is`, and `label_accuracy` when
    the file has labels and the network classifies them (`alignment`, balanced over them, when they are the groups of
    prompts). The protocol holds what the file says of its
    sampling (None for what it does not say), `num_samples`, `size`, and name and hash of reference and
    features.
    `progress(done, total)` counts images. Raises `DataError` for files that do not fit.
    """
    file = samples if isinstance(samples, SampleFile) else SampleFile.open(samples)
    network = _network(features, reference) if isinstance(features, str) else features
    if file.num_samples <= NUM_NEIGHBOURS:
        raise DataError(
            f"{file.name} has {file.num_samples} samples; at least {NUM_NEIGHBOURS + 1} are needed"
        )
    protocol = sampling_protocol(file)
    extracted = extract_all(file, network, batch_size=batch_size, device=device, progress=progress)
    target = load_reference(reference, network, batch_size=batch_size, device=device)

    prefix = "fi" if network.name == "inception" else "f"
    metrics = {f"{prefix}d": frechet_distance(*extracted.moments, *target.moments)}
    if extracted.spatial_moments is not None and target.spatial_moments is not None:
        metrics[f"s{prefix}d"] = frechet_distance(*extracted.spatial_moments, *target.spatial_moments)
    share = precision_recall(target.manifold, extracted.pool, NUM_NEIGHBOURS, device=device)
    metrics |= {"precision": share.precision, "recall": share.recall}
    if extracted.logits is not None:
        splits = math.ceil(file.num_samples / SCORE_SPLIT_SIZE)
        metrics["is"] = inception_score(_softmax(extracted.logits), splits)
        classes = network.num_label_classes
        if (
            file.labels is not None
            and classes is not None
            and file.labels.min() >= 0
            and file.labels.max() < classes
        ):
            if getattr(network, "labels_are_prompts", False):
                metrics["alignment"] = balanced_accuracy(extracted.logits, file.labels)
                protocol["alignment_by_chance"] = round(1 / classes, 4)
            else:
                metrics["label_accuracy"] = label_accuracy(extracted.logits, file.labels)
    protocol["reference"] = {"name": target.name, "hash": target.hash, "num": target.num}
    protocol["features"] = {"name": network.name, "hash": network.weights_hash}
    protocol["num_neighbours"] = NUM_NEIGHBOURS
    return {"metrics": metrics, "protocol": protocol}


def check_measures(reference: str | Path, features: str, shape: tuple[int, int, int]) -> None:
    """Raise what `evaluate` would of images of this shape [H, W, C] against this reference, before there are any.

    One black image goes through the features. reference: also `teacher`, samples that do not exist yet.
    """
    if str(reference) == TEACHER and features == "auto":
        if shape not in _FASHION_SHAPES:
            raise DataError(
                f"cannot tell which features suit images of {list(shape)}; give evaluate.features=inception:WEIGHTS"
            )
        features = "fashion"
    network = _network(features, reference)
    network.extract(np.zeros((1, *shape), dtype=np.uint8), 1, "cpu")
    if str(reference) == FASHION_TRAIN:
        load_reference(reference, network)
    elif str(reference) != TEACHER:
        SampleFile.open(reference)


def _network(features: str, reference: str | Path) -> FeatureNetwork:
    if features != "auto":
        return load_features(features)
    if str(reference) == FASHION_TRAIN:
        return load_features("fashion")
    if not Path(reference).is_file():
        raise DataError(
            f"no reference at {str(reference)!r}; use {FASHION_TRAIN}, a sample .npz or an ADM .npz"
        )
    if SampleFile.open(reference).image_shape in _FASHION_SHAPES:
        return load_features("fashion")
    raise DataError(
        f"cannot tell which features suit the reference {reference}; give --features inception:WEIGHTS"
    )


def sampling_protocol(file: SampleFile) -> dict[str, Any]:
    """What a sample file says of how it was made; None for what it does not say."""
    claimed = file.protocol.get("num_samples", file.num_samples)
    if claimed != file.num_samples:
        raise DataError(
            f"{file.name} says num_samples {claimed!r} but holds {file.num_samples}; sample again"
        )
    height, width, _ = file.image_shape
    protocol: dict[str, Any] = dict.fromkeys(_SAMPLING_FIELDS)
    protocol |= file.protocol
    return protocol | {
        "num_samples": file.num_samples,
        "size": height if height == width else [height, width],
    }


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(dim=1).numpy()

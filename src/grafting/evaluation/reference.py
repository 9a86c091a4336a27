"""References: what samples are measured against: packaged statistics, a sample file, or ADM's `.npz`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from grafting.assets import asset_path
from grafting.data.npz import NpzReader
from grafting.errors import DataError
from grafting.evaluation.feature_set import FeatureNetwork
from grafting.evaluation.features import FashionFeatures
from grafting.evaluation.metrics import RunningMoments
from grafting.evaluation.samples import SampleFile

FASHION_TRAIN = "fashion-train"
TEACHER = "teacher"  # in a recipe: samples of the teacher from other noise, drawn by the run
FASHION_ASSET = "fashion_train_reference.npz"
_NUM_MANIFOLD = 10_000
_MANIFOLD_PURPOSE = "reference-manifold"
_FORMAT = "grafting/reference/1"

Moments = tuple[np.ndarray, np.ndarray]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of pooled (and perhaps spatial) features; features [N, F] for precision and recall.

    `num` counts the images behind the moments, None where a file does not say.
    """

    name: str
    hash: str
    num: int | None
    moments: Moments
    spatial_moments: Moments | None
    manifold: np.ndarray


@dataclass(frozen=True)
class Extracted:
    """Features of a whole sample file."""

    pool: np.ndarray
    moments: Moments
    spatial_moments: Moments | None
    logits: np.ndarray | None


def extract_all(
    samples: SampleFile,
    network: FeatureNetwork,
    *,
    batch_size: int,
    device: str | torch.device,
    progress: Progress | None = None,
) -> Extracted:
    """Run `network` over a sample file batch by batch; only pooled features and logits are kept."""
    pool, logits = [], []
    moments, spatial = RunningMoments(), RunningMoments()
    done = 0
    for batch in samples.images(batch_size):
        features = network.extract(batch, batch_size, device)
        pool.append(features.pool)
        moments.update(features.pool)
        if features.spatial is not None:
            spatial.update(features.spatial)
        if features.logits is not None:
            logits.append(features.logits)
        done += len(batch)
        if progress is not None:
            progress(done, samples.num_samples)
    return Extracted(
        pool=np.concatenate(pool),
        moments=moments.result(),
        spatial_moments=spatial.result() if spatial.num else None,
        logits=np.concatenate(logits) if logits else None,
    )


def load_reference(
    source: str | Path,
    network: FeatureNetwork,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Reference:
    """Load a reference for `network`: `fashion-train` (packaged), a sample `.npz`, or an ADM `.npz`.

    ADM's own statistics are used as they are; precision and recall use the images in the file. Raises
    `DataError` when the reference is of other features than `network`.
    """
    if str(source) == FASHION_TRAIN:
        return _packaged(network)
    if not Path(source).is_file():
        raise DataError(f"no reference at {str(source)!r}; use {FASHION_TRAIN}, a sample .npz or an ADM .npz")
    samples = SampleFile.open(source)
    extracted = extract_all(samples, network, batch_size=batch_size, device=device, progress=progress)
    moments, spatial, num = extracted.moments, extracted.spatial_moments, samples.num_samples
    if not samples.statistics:
        return Reference(samples.name, samples.content_hash(), num, moments, spatial, extracted.pool)
    stored = samples.statistics
    missing = {"mu", "sigma"} - set(stored)
    if missing:
        raise DataError(f"{source} has no {' and no '.join(sorted(missing))}; expected ADM's mu and sigma")
    if stored["mu"].shape != moments[0].shape or stored["sigma"].shape != moments[1].shape:
        raise DataError(
            f"{source} holds statistics of {list(stored['mu'].shape)} features but {network.name!r} has "
            f"{list(moments[0].shape)}; ADM references need inception features (inception:PATH)"
        )
    if spatial is not None:
        spatial = (stored["mu_s"], stored["sigma_s"]) if {"mu_s", "sigma_s"} <= set(stored) else None
    moments = (stored["mu"], stored["sigma"])
    return Reference(samples.name, samples.content_hash(), None, moments, spatial, extracted.pool)


def build_reference(data: str | Path) -> dict[str, np.ndarray]:
    """Statistics of Fashion-MNIST's training set in folder `data` under the packaged classifier, as arrays.

    `mu`, `sigma` of all 60,000 in float64; `features` of a stratified 10,000 in float16; `meta`.
    """
    from grafting.data.fashion import load_full, pad_to_32
    from grafting.data.stratify import stratified_indices

    images, labels = load_full(data, "train")
    network = FashionFeatures()
    samples = SampleFile(pad_to_32(images).transpose(0, 2, 3, 1), labels, {}, name=FASHION_TRAIN)
    extracted = extract_all(samples, network, batch_size=500, device="cpu")
    chosen = stratified_indices(labels, _NUM_MANIFOLD, seed=0, purpose=_MANIFOLD_PURPOSE)
    meta = {
        "format": _FORMAT,
        "name": FASHION_TRAIN,
        "num": samples.num_samples,
        "features": network.name,
        "features_hash": network.weights_hash,
        "hash": samples.content_hash(),
    }
    mu, sigma = extracted.moments
    manifold = extracted.pool[chosen].astype(np.float16)
    return {"mu": mu, "sigma": sigma, "features": manifold, "meta": np.array(json.dumps(meta))}


def _packaged(network: FeatureNetwork) -> Reference:
    archive = NpzReader(asset_path(FASHION_ASSET))
    meta = json.loads(str(archive.read("meta")))
    if network.weights_hash != meta["features_hash"]:
        raise DataError(
            f"reference {FASHION_TRAIN!r} holds statistics of the packaged fashion classifier, not of "
            f"{network.name!r}; use --features fashion, or give a .npz of real images as the reference"
        )
    manifold = archive.read("features").astype(np.float32)
    moments = (archive.read("mu"), archive.read("sigma"))
    return Reference(FASHION_TRAIN, meta["hash"], meta["num"], moments, None, manifold)

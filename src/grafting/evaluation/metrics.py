"""The measures themselves, as pure functions of features, probabilities and labels.

Axes: N real examples, M generated examples, F features, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grafting.errors import DataError

_CHUNK_ELEMENTS = 1 << 24  # of one block of pairwise distances: 64 MB in float32


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of samples on the real manifold, and of real examples on the sample manifold."""

    precision: float
    recall: float


class RunningMoments:
    """Mean and covariance of vectors [*, F] that arrive in batches, in float64 and bounded memory.

    Sums are taken about the mean of the first batch, so large offsets lose no digits. The covariance divides
    by N - 1, as `numpy.cov` does.
    """

    def __init__(self) -> None:
        self.num = 0
        self._shift = np.zeros(0)
        self._sum = np.zeros(0)
        self._products = np.zeros((0, 0))

    def update(self, features: np.ndarray) -> None:
        """Add a batch of vectors [B, F]; `DataError` if any value is not finite."""
        batch = _finite(features, "features").astype(np.float64)
        if self.num == 0:
            self._shift = batch.mean(axis=0)
            self._sum = np.zeros_like(self._shift)
            self._products = np.zeros((batch.shape[1], batch.shape[1]))
        batch -= self._shift
        self.num += len(batch)
        self._sum += batch.sum(axis=0)
        self._products += batch.T @ batch

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (mean [F], covariance [F, F]); `DataError` for fewer than two vectors."""
        if self.num < 2:
            raise DataError(f"a covariance needs at least 2 examples, got {self.num}; give more samples")
        mean = self._sum / self.num
        covariance = (self._products - self.num * np.outer(mean, mean)) / (self.num - 1)
        return mean + self._shift, covariance


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Dowson and Landau 1982; Heusel et al. 2017 (equation 6). tr (C1 C2)^(1/2) is the sum of the square roots
    of the eigenvalues of S C2 S with S = C1^(1/2), which are real and not negative even when C1 is singular.
    Means are [F], covariances [F, F]. Raises `DataError` for other shapes, values that are not finite, and
    matrices that are no covariances.
    """
    mu1, mu2 = np.atleast_1d(_finite(mu1, "mean 1")), np.atleast_1d(_finite(mu2, "mean 2"))
    cov1, cov2 = np.atleast_2d(_finite(cov1, "covariance 1")), np.atleast_2d(_finite(cov2, "covariance 2"))
    shapes = (mu1.shape, mu2.shape, cov1.shape, cov2.shape)
    size = len(mu1)
    if shapes != ((size,), (size,), (size, size), (size, size)):
        raise DataError(
            f"means [F] and covariances [F, F] must agree, got {[list(shape) for shape in shapes]}"
        )
    values, vectors = _eigh(cov1, "covariance 1")
    _eigh(cov2, "covariance 2")
    root = (vectors * np.sqrt(values)) @ vectors.T
    cross = root @ cov2 @ root
    trace_root = np.sqrt(np.clip(np.linalg.eigvalsh((cross + cross.T) / 2), 0.0, None)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(cov1) + np.trace(cov2) - 2.0 * trace_root
    return max(0.0, float(distance))


def manifold_radii(features: np.ndarray, k: int = 3, *, device: str | torch.device = "cpu") -> np.ndarray:
    """Return the squared distance [N] of each feature vector [N, F] to its k-th nearest other one."""
    x = _vectors(features, "features")
    if not 1 <= k < len(x):
        raise DataError(f"k nearest neighbours need 1 <= k < {len(x)} (the number of examples), got k = {k}")
    return _radii((x - x.mean(dim=0)).to(device), k).cpu().numpy()


def precision_recall(
    real: np.ndarray,
    fake: np.ndarray,
    k: int = 3,
    *,
    real_radii: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> PrecisionRecall:
    """Improved precision and recall of `fake` [M, F] against `real` [N, F] (Kynkaanniemi 2019, eq. 1-2).

    A vector lies on the manifold of a set if it is within the k-nearest-neighbour radius of one of its
    members (borders included). `real_radii` [N] may be given from `manifold_radii(real, k)` to save time.
    Distances are float32, computed in blocks on `device`. Raises `DataError` for fewer than k + 1 vectors.
    """
    x, y = _vectors(real, "real features"), _vectors(fake, "sample features")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"real features have {x.shape[1]} dimensions but sample features {y.shape[1]}")
    if not 1 <= k < min(len(x), len(y)):
        raise DataError(
            f"precision and recall at k = {k} need over {k} vectors, got {len(x)} real, {len(y)} fake"
        )
    center = x.mean(dim=0)  # distances do not change, their rounding shrinks
    x, y = (x - center).to(device), (y - center).to(device)
    if real_radii is None:
        radii_x = _radii(x, k)
    else:
        radii_x = torch.from_numpy(_finite(real_radii, "radii")).float().to(device)
    radii_y = _radii(y, k)
    if radii_x.shape != (len(x),):
        raise DataError(f"radii must be [{len(x)}], one per real example, got {list(radii_x.shape)}")
    inside_x = torch.zeros(len(y), dtype=torch.bool, device=device)
    inside_y = torch.zeros(len(x), dtype=torch.bool, device=device)
    rows = _rows(len(y))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        distances = _squared_distances(x[part], y)  # [rows, M]
        inside_x |= (distances <= radii_x[part, None]).any(dim=0)
        inside_y[part] = (distances <= radii_y).any(dim=1)
    return PrecisionRecall(int(inside_x.sum()) / len(y), int(inside_y.sum()) / len(x))


def inception_score(probs: np.ndarray, splits: int = 1) -> float:
    """exp of the mean KL(p(y|x) || p(y)) over x, averaged over `splits` parts (Salimans 2016, section 4).

    `probs` [N, K] are probabilities, rows sum to 1. Between 1 and K.
    """
    p = _finite(probs, "probabilities")
    if p.ndim != 2 or not 1 <= splits <= len(p):
        raise DataError(f"probabilities must be [N, K] with N >= {splits} (splits), got {list(p.shape)}")
    if p.min() < 0 or np.abs(p.sum(axis=1, dtype=np.float64) - 1).max() > 1e-3:
        raise DataError("probabilities must be at least 0 and sum to 1 in each row; apply a softmax first")
    scores = []
    for part in (part.astype(np.float64) for part in np.array_split(p, splits)):
        marginal = part.mean(axis=0)
        kl = (
            _xlogx(part).sum(axis=1) - (part * np.log(np.where(marginal > 0, marginal, 1.0))).sum(axis=1)
        ).mean()
        scores.append(math.exp(kl))
    return math.fsum(scores) / splits


def label_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose largest logit [N, K] is that of their label [N]."""
    if logits.ndim != 2 or labels.shape != (len(logits),) or len(labels) == 0:
        raise DataError(
            f"expected logits [N, K] and labels [N], got {list(logits.shape)}, {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(f"labels must be 0..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}")
    return float((_finite(logits, "logits").argmax(axis=1) == labels).mean())


def balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the labels that occur of the share of their examples whose largest logit [N, K] is theirs.

    Every label counts alike, however many examples [N] it has: by chance 1 / K.
    """
    label_accuracy(logits, labels)  # the same demands on both
    hits = logits.argmax(axis=1) == labels
    return float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def _eigh(matrix: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, clipped at 0, and eigenvectors of a covariance; an error if it is none beyond rounding."""
    scale = max(float(np.abs(matrix).max()), np.finfo(np.float64).tiny)
    if np.abs(matrix - matrix.T).max() > 1e-4 * scale:
        raise DataError(f"{what} is not symmetric; give the output of numpy.cov(features, rowvar=False)")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    if values[0] < -1e-4 * max(float(values[-1]), scale):
        raise DataError(f"{what} has the negative eigenvalue {values[0]:.3g}; a covariance has none")
    return np.clip(values, 0.0, None), vectors


def _radii(x: Tensor, k: int) -> Tensor:
    radii = []
    rows = _rows(len(x))
    for start in range(0, len(x), rows):
        distances = _squared_distances(x[start : start + rows], x)  # [rows, N]
        index = torch.arange(len(distances), device=x.device)
        distances[index, start + index] = 0.0  # itself, free of rounding: the smallest
        radii.append(distances.topk(k + 1, dim=1, largest=False).values[:, k])
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    lengths_x, lengths_y = x.square().sum(dim=1), y.square().sum(dim=1)
    return torch.addmm(lengths_y[None, :], x, y.T, alpha=-2.0).add_(lengths_x[:, None]).clamp_(min=0.0)


def _rows(num_columns: int) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, num_columns))


def _vectors(features: np.ndarray, what: str) -> Tensor:
    if features.ndim != 2 or len(features) == 0:
        raise DataError(f"{what} must be [N, F] with N >= 1, got {list(features.shape)}")
    return torch.from_numpy(np.ascontiguousarray(_finite(features, what), dtype=np.float32))


def _xlogx(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1.0))


def _finite(values: np.ndarray, what: str) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{what} hold values that are not finite; the samples or the features are broken")
    return values

"""Measures against closed forms and their definitions; what is no input to them is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evaluation_tools import rng
from hypothesis import given, settings
from hypothesis import strategies as st

from grafting.errors import DataError
from grafting.evaluation.metrics import (
    RunningMoments,
    frechet_distance,
    inception_score,
    label_accuracy,
    manifold_radii,
    precision_recall,
)


def test_frechet_distance_in_one_dimension() -> None:
    # (m1 - m2)^2 + (s1 - s2)^2
    assert frechet_distance(
        np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])
    ) == pytest.approx(5)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    a, b, mu = rng(0).uniform(0, 4, 30), rng(1).uniform(0, 4, 30), rng(2).normal(size=30)
    a[:10] = 0  # singular
    expected = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu, np.diag(a), np.zeros(30), np.diag(b)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    x, y = rng(0).normal(size=(200, 12)), rng(1).normal(size=(200, 12)) @ rng(2).normal(size=(12, 12)) + 1
    stats = [(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)]
    (m1, c1), (m2, c2) = stats
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)
    rotation = np.linalg.qr(rng(3).normal(size=(12, 12)))[0]
    rotated = frechet_distance(
        rotation @ m1, rotation @ c1 @ rotation.T, rotation @ m2, rotation @ c2 @ rotation.T
    )
    assert rotated == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_samples_than_features() -> None:
    x = rng(0).normal(size=(20, 64))
    mean, covariance = x.mean(0), np.cov(x, rowvar=False)
    assert frechet_distance(mean, covariance, mean + 1, covariance) == pytest.approx(64, rel=1e-6)


@pytest.mark.parametrize(
    ("covariance", "reason"),
    [
        (np.array([[1.0, 0.0], [0.0, math.nan]]), "not finite"),
        (np.array([[1.0, 0.5], [-0.5, 1.0]]), "not symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
        (np.eye(3), "must agree"),
    ],
)
def test_frechet_distance_refuses_what_is_no_covariance(covariance: np.ndarray, reason: str) -> None:
    for first, second in ((covariance, np.eye(2)), (np.eye(2), covariance)):
        with pytest.raises(DataError, match=reason):
            frechet_distance(np.zeros(2), first, np.zeros(2), second)


def test_running_moments_equal_numpy_far_from_the_origin() -> None:
    x = rng().normal(size=(101, 5)) * [1, 2, 3, 4, 5] + 1e6
    moments = RunningMoments()
    for start in range(0, 101, 10):
        moments.update(x[start : start + 10])
    mean, covariance = moments.result()
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-7)
    with pytest.raises(DataError, match="not finite"):
        moments.update(np.array([[1.0, 2.0, 3.0, 4.0, math.inf]]))
    with pytest.raises(DataError, match="at least 2"):
        RunningMoments().result()


def test_manifold_radii_on_a_line() -> None:
    points = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert manifold_radii(points, 1).tolist() == [1, 1, 4, 16]
    assert manifold_radii(points, 2).tolist() == [9, 4, 9, 36]


def test_precision_and_recall_of_constructed_sets() -> None:
    line = np.arange(10.0)[:, None] * [1.0, 0.0]
    assert precision_recall(line, line, k=1) == (1.0, 1.0)
    assert precision_recall(line, line + np.array([0.0, 100.0]), k=1) == (0.0, 0.0)
    # Half of the samples sit on the first three real points, which are all that they cover.
    fake = np.concatenate([line[:3], line[:3] + np.array([0.0, 1000.0])])
    assert precision_recall(line, fake, k=1) == (0.5, 0.4)  # 0, 1, 2, and 3 at the border of 2
    # One dense cluster inside a wide real set: all precise, little recalled.
    dense = 4.5 * np.ones((8, 2)) * [1.0, 0.0] + 1e-3 * rng().normal(size=(8, 2))
    assert precision_recall(line, dense, k=3) == (1.0, 0.0)


@given(seed=st.integers(0, 1000), k=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_precision_recall_equals_the_definition(seed: int, k: int) -> None:
    real, fake = rng(seed).integers(-3, 4, (30, 2)) * 1.0, rng(seed + 1).integers(-2, 6, (20, 2)) * 1.0

    def share(a: np.ndarray, b: np.ndarray) -> float:
        within = np.sort(((a[:, None] - a[None]) ** 2).sum(-1), axis=1)[:, k]
        return float((((b[:, None] - a[None]) ** 2).sum(-1) <= within).any(axis=1).mean())

    shift = real.astype(np.float32).mean(axis=0)  # the definition on the very numbers, free of rounding
    if np.all(shift * 30 == np.round(shift * 30)) and np.all(shift == np.round(shift * 64) / 64):
        assert precision_recall(real, fake, k) == pytest.approx((share(real, fake), share(fake, real)))
    real, fake = rng(seed).normal(size=(30, 3)), rng(seed + 1).normal(size=(20, 3)) + 0.5
    assert precision_recall(real, fake, k) == pytest.approx((share(real, fake), share(fake, real)))


def test_precision_recall_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = rng(0).normal(size=(90, 5)), rng(1).normal(size=(70, 5)) + 0.3
    whole = precision_recall(real, fake)
    assert precision_recall(real, fake, real_radii=manifold_radii(real)) == whole
    monkeypatch.setattr("grafting.evaluation.metrics._CHUNK_ELEMENTS", 200)
    assert precision_recall(real, fake) == whole
    with pytest.raises(DataError, match="over 3 vectors"):
        precision_recall(real, fake[:3])


def test_inception_score_of_uniform_and_one_hot() -> None:
    assert inception_score(np.full((50, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.eye(10)[np.arange(50) % 10]) == pytest.approx(10)
    assert inception_score(np.eye(10)[np.zeros(50, dtype=int)]) == pytest.approx(1)
    half = np.concatenate([np.eye(4), np.full((4, 4), 0.25)])  # mean KL = log(4) / 2
    assert inception_score(half) == pytest.approx(2)
    assert inception_score(half, splits=2) == pytest.approx((4 + 1) / 2)
    with pytest.raises(DataError, match="softmax"):
        inception_score(np.ones((5, 3)))


def test_label_accuracy_counts_hits() -> None:
    assert label_accuracy(np.eye(4), np.array([0, 1, 2, 0])) == 0.75
    with pytest.raises(DataError, match=r"0\.\.3, got 0\.\.4"):
        label_accuracy(np.eye(4), np.array([0, 1, 2, 4]))

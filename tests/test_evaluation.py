"""Evaluations against each kind of reference, and their comparison: unlike protocols are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_tools import PROTOCOL, fashion_images, rng

from grafting.errors import DataError, GraftError
from grafting.evaluation import FeatureSet, SampleFile, compare, evaluate, read_evaluation, write_samples


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("samples")
    images, labels = fashion_images(0, 120)
    noisy = np.clip(images + rng().normal(0, 40, images.shape), 0, 255).astype(np.uint8)
    write_samples(folder / "clean.npz", images, labels, PROTOCOL)
    write_samples(folder / "noisy.npz", noisy, labels, PROTOCOL | {"seed": 1, "model": "student"})
    return {name: evaluate(folder / f"{name}.npz", batch_size=50) for name in ("clean", "noisy")}


def test_evaluate_against_the_packaged_reference(evaluations: dict[str, dict[str, Any]]) -> None:
    clean, noisy = evaluations["clean"], evaluations["noisy"]
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean
    assert set(clean["metrics"]) == {"fd", "precision", "recall", "is", "label_accuracy"}
    assert clean["metrics"]["fd"] < 40 < noisy["metrics"]["fd"]
    assert clean["metrics"]["label_accuracy"] > 0.85
    assert clean["metrics"]["precision"] > 0.8
    assert 5 < clean["metrics"]["is"] <= 10
    protocol = clean["protocol"]
    assert protocol | PROTOCOL == protocol
    assert protocol["size"] == 32
    assert protocol["reference"]["name"] == "fashion-train"
    assert protocol["reference"]["num"] == 60_000
    assert protocol["features"]["name"] == "fashion"


def test_evaluate_against_a_sample_file(tmp_path: Path) -> None:
    images, labels = fashion_images(0, 60)
    write_samples(tmp_path / "a.npz", images, labels, {})
    counts: list[tuple[int, int]] = []
    result = evaluate(
        tmp_path / "a.npz", tmp_path / "a.npz", batch_size=25, progress=lambda *count: counts.append(count)
    )
    assert result["metrics"]["fd"] == pytest.approx(0, abs=1e-5)
    assert result["metrics"]["precision"] == result["metrics"]["recall"] == 1
    assert result["protocol"]["reference"]["num"] == 60
    assert result["protocol"]["steps"] is None
    assert counts == [(25, 60), (50, 60), (60, 60)]


class Means:
    """A feature network of channel means: everything about it is known in closed form."""

    name = "inception"
    weights_hash = "none"
    num_label_classes = None

    def extract(self, images: np.ndarray, batch_size: int = 1, device: Any = "cpu") -> FeatureSet:
        pool = images.mean(axis=(1, 2)).astype(np.float32)
        return FeatureSet(pool, spatial=2 * pool)


def test_evaluate_with_adm_statistics(tmp_path: Path) -> None:
    images = rng().integers(0, 256, (50, 6, 6, 3), dtype=np.uint8)
    mean = images.mean(axis=(1, 2)).astype(np.float32)
    mu, sigma = mean.mean(0), np.cov(mean, rowvar=False)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu + 1, sigma=sigma, mu_s=2 * mu, sigma_s=4 * sigma)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    result = evaluate(tmp_path / "samples.npz", tmp_path / "adm.npz", Means())
    assert set(result["metrics"]) == {"fid", "sfid", "precision", "recall"}
    assert result["metrics"]["fid"] == pytest.approx(3, abs=1e-3)
    assert result["metrics"]["sfid"] == pytest.approx(0, abs=1e-3)
    assert result["protocol"]["reference"]["num"] is None
    with pytest.raises(DataError, match="inception:"):
        evaluate(tmp_path / "samples.npz", tmp_path / "adm.npz")
    with pytest.raises(DataError, match="not of 'inception'"):
        evaluate(tmp_path / "samples.npz", "fashion-train", Means())
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match="need inception features"):
        evaluate(tmp_path / "samples.npz", tmp_path / "adm.npz", Means())


def test_evaluate_refuses_bad_samples(tmp_path: Path) -> None:
    images, labels = fashion_images(0, 10)
    with pytest.raises(DataError, match="at least 4"):
        evaluate(SampleFile(images[:3], labels[:3], {}))
    with pytest.raises(DataError, match="num_samples 50 but holds 10"):
        evaluate(SampleFile(images, labels, {"num_samples": 50}))
    with pytest.raises(DataError, match="no reference at"):
        evaluate(SampleFile(images, labels, {}), tmp_path / "none.npz")


def test_compare_gives_differences_and_ratios(evaluations: dict[str, dict[str, Any]]) -> None:
    clean, noisy = evaluations["clean"], evaluations["noisy"]
    result = compare(clean, noisy)
    row = result["metrics"]["fd"]
    assert row["difference"] == noisy["metrics"]["fd"] - clean["metrics"]["fd"]
    assert row["ratio"] == noisy["metrics"]["fd"] / clean["metrics"]["fd"]
    assert result["differs"] == {"model": ["teacher", "student"], "seed": [0, 1]}
    assert result["protocol"]["steps"] == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 20}, "steps 10 and 20"),
        ({"sampler": "ddim", "guidance": 4.0}, r"guidance 1.5 and 4.0; sampler 'dpm\+\+' and 'ddim'"),
        ({"num_samples": 99}, "num_samples 120 and 99"),
        ({"labels": "random"}, "labels 'i mod classes' and 'random'"),
        ({"size": 64}, "size 32 and 64"),
        ({"reference": {"name": "fashion-train", "hash": "x", "num": 60_000}}, "reference.hash"),
        ({"features": {"name": "fashion", "hash": "x"}}, "features.hash"),
        ({"precision": "bf16"}, "precision None and 'bf16'"),
    ],
)
def test_compare_refuses_unlike_protocols(
    evaluations: dict[str, dict[str, Any]], change: dict[str, Any], reason: str
) -> None:
    other = copy.deepcopy(evaluations["clean"])
    other["protocol"] |= change
    with pytest.raises(GraftError, match=reason):
        compare(evaluations["clean"], other)


def test_read_evaluation(tmp_path: Path, evaluations: dict[str, dict[str, Any]]) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps(evaluations["clean"]))
    assert read_evaluation(path) == evaluations["clean"]
    for text, reason in {
        "{": "cannot read",
        "[]": "must be a JSON object",
        "{}": "no 'metrics'",
        '{"metrics": {"fd": NaN}, "protocol": {}}': "finite number",
        '{"metrics": {"fd": "1"}, "protocol": {}}': "finite number",
    }.items():
        path.write_text(text)
        with pytest.raises(GraftError, match=reason):
            read_evaluation(path)
    with pytest.raises(GraftError, match="cannot read"):
        read_evaluation(tmp_path / "none.json")


def test_the_evaluation_of_a_run_is_its_student_s(
    tmp_path: Path, evaluations: dict[str, dict[str, Any]]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(GraftError, match=r"holds no evaluation\.json"):
        read_evaluation(run)
    both = {"teacher": evaluations["clean"], "student": evaluations["noisy"], "comparison": {}}
    (run / "evaluation.json").write_text(json.dumps(both))
    assert read_evaluation(run) == read_evaluation(run / "evaluation.json") == evaluations["noisy"]
    (run / "evaluation.json").write_text('{"teacher": {}, "student": {}}')
    with pytest.raises(GraftError, match="no 'metrics'"):
        read_evaluation(run)

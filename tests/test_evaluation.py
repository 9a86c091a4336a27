"""Measures against closed forms; sample files against hostile input; evaluations and their comparison."""

from __future__ import annotations

import copy
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grafting.data import load_dataset
from grafting.errors import CheckpointError, DataError, GraftError, RunError
from grafting.evaluation import (
    FeatureSet,
    SampleFile,
    SampleWriter,
    compare,
    evaluate,
    load_features,
    read_evaluation,
    register_features,
    to_uint8,
    write_samples,
)
from grafting.evaluation.fashion_classifier import FashionClassifier, load_classifier
from grafting.evaluation.features import FashionFeatures
from grafting.evaluation.inception import InceptionV3, load_inception, prepare
from grafting.evaluation.metrics import (
    RunningMoments,
    frechet_distance,
    inception_score,
    label_accuracy,
    manifold_radii,
    precision_recall,
)

PROTOCOL = {
    "steps": 10,
    "sampler": "dpm++",
    "guidance": 1.5,
    "seed": 0,
    "labels": "i mod classes",
    "num_samples": 120,
    "model": "teacher",
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def fashion_images(start: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_dataset("fashion-10").batch(range(start, start + num))
    return to_uint8(x), y.numpy()


# Measures


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


# Sample files


def test_to_uint8_truncates_and_clips() -> None:
    x = torch.tensor([-2.0, -1.0, -1.0 + 1 / 127.5, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 7)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 1, 128, 255, 255, 255]
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(levels / 127.5 - 1)[..., 0], levels[:, 0].numpy())
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    with pytest.raises(DataError, match="not finite"):
        to_uint8(torch.full((1, 1, 1, 1), torch.nan))


def test_sample_file_round_trip(tmp_path: Path) -> None:
    images = rng().integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    labels = np.arange(7) % 3
    write_samples(tmp_path / "new" / "a.npz", images, labels, PROTOCOL)
    file = SampleFile.open(tmp_path / "new" / "a.npz")
    assert (file.num_samples, file.image_shape, file.name, file.protocol) == (7, (4, 5, 3), "a", PROTOCOL)
    assert np.array_equal(np.concatenate(list(file.images(3))), images)
    assert file.labels is not None
    assert file.labels.tolist() == labels.tolist()
    assert file.content_hash() == SampleFile(images, labels, {}).content_hash()
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as plain:
        assert np.array_equal(plain["arr_0"], images)
        assert plain["arr_1"].dtype == np.int64
        assert json.loads(str(plain["meta"])) == PROTOCOL


def test_sample_writer_in_batches_gives_the_same_bytes(tmp_path: Path) -> None:
    images, labels = rng().integers(0, 256, (7, 4, 4, 1), dtype=np.uint8), np.arange(7)
    write_samples(tmp_path / "a.npz", images, labels, PROTOCOL)
    with SampleWriter(tmp_path / "b.npz", 7, (4, 4, 1), labels, PROTOCOL) as file:
        for start in range(0, 7, 2):
            file.append(images[start : start + 2])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_sample_writer_leaves_nothing_half_done(tmp_path: Path) -> None:
    images, labels = np.zeros((2, 4, 4, 1), np.uint8), np.arange(3)
    with (
        pytest.raises(DataError, match="2 of 3 images"),
        SampleWriter(tmp_path / "a.npz", 3, (4, 4, 1), labels, {}) as file,
    ):
        file.append(images)
    with pytest.raises(KeyboardInterrupt), SampleWriter(tmp_path / "a.npz", 3, (4, 4, 1), labels, {}) as file:
        raise KeyboardInterrupt
    with (
        pytest.raises(DataError, match="closed or full"),
        SampleWriter(tmp_path / "a.npz", 3, (4, 4, 1), labels, {}) as file,
    ):
        file.append(np.zeros((4, 4, 4, 1), np.uint8))
    with pytest.raises(DataError, match="plain JSON"):
        write_samples(tmp_path / "a.npz", images, labels[:2], {"guidance": math.nan})
    with pytest.raises(DataError, match="labels must be integers"):
        write_samples(tmp_path / "a.npz", images, labels, {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_samples(tmp_path / "file" / "a.npz", images, labels[:2], {})


def test_sample_file_refuses_what_is_none(tmp_path: Path) -> None:
    grey, labels = np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64)
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "floats": ({"arr_0": grey.astype(np.float32)}, "must be uint8"),
        "flat": ({"arr_0": grey[..., 0]}, "must be uint8"),
        "none": ({"arr_0": grey[:0]}, "must be uint8"),
        "unnamed": ({"images": grey}, "no array 'arr_0'; it holds: images"),
        "labels": ({"arr_0": grey, "arr_1": labels[:3]}, "labels must be integers"),
        "float_labels": ({"arr_0": grey, "arr_1": labels.astype(np.float32)}, "labels must be integers"),
        "meta_kind": ({"arr_0": grey, "meta": np.zeros(3)}, "one JSON string"),
        "meta_text": ({"arr_0": grey, "meta": np.array("{nonsense")}, "not JSON"),
        "meta_nan": ({"arr_0": grey, "meta": np.array('{"guidance": NaN}')}, "not JSON"),
        "meta_list": ({"arr_0": grey, "meta": np.array("[1]")}, "must be a JSON object"),
        "meta_deep": ({"arr_0": grey, "meta": np.array("[" * 100_000)}, "not JSON"),
        "objects": ({"arr_0": np.array([{}, None], dtype=object)}, "pickles are not read|no pickles|pickle"),
    }
    for name, (arrays, reason) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(DataError, match=reason) as caught:
            SampleFile.open(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)
    np.savez(tmp_path / "whole.npz", arr_0=grey, arr_1=labels)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:150])
    with pytest.raises(DataError, match="cannot read"):
        SampleFile.open(tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        header = (
            b"\x93NUMPY\x01\x00\x76\x00"
            + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 9999, 9999, 3), }"
        )
        archive.writestr("arr_0.npy", header.ljust(127) + b"\n")
    with pytest.raises(DataError, match="data bytes"):
        SampleFile.open(tmp_path / "liar.npz")


# Feature networks


def test_packaged_classifier_knows_its_data() -> None:
    from safetensors import safe_open

    from grafting.assets import asset_path

    with safe_open(asset_path("fashion_classifier.safetensors"), framework="pt") as file:
        assert float(file.metadata()["test_accuracy"]) >= 0.91
    images, labels = fashion_images(0, 500)
    features = load_features("fashion").extract(images)
    assert features.pool.shape == (500, 128)
    assert features.pool.dtype == np.float32
    assert features.logits is not None
    assert label_accuracy(features.logits, labels) > 0.9
    assert features.pool.var(axis=0).mean() == pytest.approx(1, abs=0.1)
    blocks = load_features("fashion").extract(images, batch_size=33)
    np.testing.assert_allclose(blocks.pool, features.pool, atol=2e-5)
    inner = load_features("fashion").extract(images[:, 2:30, 2:30])
    np.testing.assert_allclose(inner.pool, features.pool, atol=2e-5)


def test_feature_networks_refuse_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fashion features take uint8 \[N, 32, 32, 1\]"):
        FashionFeatures().extract(np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(
        GraftError, match="unknown feature network 'clip'; known are: emoji, fashion, inception"
    ):
        load_features("clip")
    with pytest.raises(DataError, match="inception:PATH"):
        load_features("inception")
    with pytest.raises(GraftError, match="registered already"):
        register_features("fashion", FashionFeatures)
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "w.pth")
    torch.save(FashionClassifier, tmp_path / "code.pth")
    for name in ("w.safetensors", "w.pth", "code.pth", "none.pth"):
        with pytest.raises(CheckpointError, match="InceptionV3") as caught:
            load_inception(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="train_classifier"):
        load_classifier(tmp_path / "w.safetensors")


def test_inception_has_the_public_layout() -> None:
    with torch.device("meta"):
        model = InceptionV3().eval()
        pool, spatial, logits = model(torch.empty(2, 3, 299, 299))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    # 21,785,568 in convolutions and batch norms: InceptionV3 without its auxiliary head
    assert sum(p.numel() for p in model.parameters()) == 21_785_568 + 2048 * 1008 + 1008
    names = model.state_dict()
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.bn.running_var": (64,),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert tuple(names[name].shape) == shape


def test_inception_features_from_a_weight_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = InceptionV3().eval()
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth")
    images = rng().integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    network = load_features(f"inception:{tmp_path / 'w.pth'}")
    features = network.extract(images)
    maps: list[torch.Tensor] = []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        pool, _, logits = model(prepare(torch.from_numpy(images).permute(0, 3, 1, 2).float()))
    assert features.spatial is not None
    assert features.logits is not None
    np.testing.assert_allclose(features.pool, pool, rtol=1e-4)
    np.testing.assert_allclose(features.logits, logits, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(features.spatial.reshape(2, 17, 17, 7)[..., 3], maps[0][:, 3], rtol=1e-4)
    assert (network.name, len(network.weights_hash), network.num_label_classes) == ("inception", 64, None)


def test_inception_input_scaling() -> None:
    ramp = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 4, 4) * 64
    x = prepare(ramp)
    assert x.shape == (1, 3, 299, 299)
    source = torch.arange(299.0) * 4 / 299  # the corner of pixel 0 is at 0; beyond pixel 3 the edge is held
    torch.testing.assert_close(x[0, 2, 17], (source.clamp(max=3) * 64 - 128) / 128, atol=1e-5, rtol=0)
    same = torch.rand(1, 3, 299, 299) * 255
    torch.testing.assert_close(prepare(same), (same - 128) / 128)


# Evaluate and compare


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

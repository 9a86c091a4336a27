"""Feature networks: the packaged classifier knows its data, Inception is the public one; other files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_tools import fashion_images, rng

from grafting.errors import CheckpointError, DataError, GraftError
from grafting.evaluation import load_features, register_features
from grafting.evaluation.fashion_classifier import FashionClassifier, load_classifier
from grafting.evaluation.features import FashionFeatures
from grafting.evaluation.inception import InceptionV3, load_inception, prepare
from grafting.evaluation.metrics import label_accuracy


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

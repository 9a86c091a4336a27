"""Sample files: what was written is read back, hostile files are refused, nothing is left half done."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_tools import PROTOCOL, rng

from grafting.errors import CheckpointError, DataError
from grafting.evaluation import SampleFile, SampleWriter, to_uint8, write_samples


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
    with pytest.raises(CheckpointError, match="can't write"):
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

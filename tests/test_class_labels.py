"""Labels of samples that are given: what they mean, what the protocol says of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit

from grafting.class_labels import check_labels, name_labels, read_labels
from grafting.errors import DataError
from grafting.evaluation.samples import SampleFile
from grafting.generation import generate


def test_images_are_of_the_labels_given(tmp_path: Path) -> None:
    """Image i depends on its own label, whatever the batch; the protocol tells given labels from others."""
    model, common = tiny_dit(num_classes=10), {"num": 6, "steps": 2, "batch_size": 4}

    def drawn(name: str, **labels: Any) -> SampleFile:
        return SampleFile.open(generate(model, tmp_path / f"{name}.npz", **common, **labels))

    plain, same = drawn("plain"), drawn("same", labels=range(6))
    some = drawn("some", labels=torch.tensor([0, 1, 7, 3, 4, 9]))
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("plain", "same", "some")]
    assert np.array_equal(images[0], images[1])
    assert plain.protocol["labels"] == same.protocol["labels"] == "i mod 10"
    assert [bool((a == b).all()) for a, b in zip(images[0], images[2], strict=True)] == [
        True, True, False, True, True, False,
    ]  # fmt: skip
    assert some.labels is not None
    assert some.labels.tolist() == [0, 1, 7, 3, 4, 9]
    assert some.protocol["labels"] == "0, 1, 7, 3, 4, 9"
    with pytest.raises(DataError, match=r"no class 10: classes of this model are 0 to 9"):
        drawn("beyond", labels=[0, 1, 2, 3, 4, 10])
    with pytest.raises(DataError, match="2 labels for 6 images"):
        drawn("few", labels=[0, 1])
    assert not (tmp_path / "few.npz").exists()


def test_many_labels_are_told_apart_by_a_hash() -> None:
    a, b = np.zeros(21, np.int64), np.zeros(21, np.int64)
    b[20] = 1
    assert name_labels(a, 10) == name_labels(a.copy(), 10)
    assert name_labels(a, 10).startswith("sha256 ")
    assert name_labels(a, 10) != name_labels(b, 10)


def test_every_form_of_labels_is_read(tmp_path: Path) -> None:
    wanted = np.array([3, 5, 7, 3, 5])
    np.save(tmp_path / "a.npy", wanted)
    np.savez(tmp_path / "b.npz", wanted.astype(np.uint8))
    np.savez(tmp_path / "c.npz", arr_0=np.zeros((5, 8, 8, 1), np.uint8), arr_1=wanted)
    (tmp_path / "d.txt").write_text("3\n5\n7\n3\n5\n")
    for given in (
        "3,5,7",
        "3, 5, 7",
        *(str(tmp_path / name) for name in ("a.npy", "b.npz", "c.npz", "d.txt")),
    ):
        found = read_labels(given, 5)
        assert (found.tolist(), found.dtype) == (wanted.tolist(), np.int64), given


def test_what_is_no_labels_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "halves.npy", np.array([0.5]))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.arange(2), b=np.arange(2))
    (tmp_path / "words.txt").write_text("cat")
    (tmp_path / "short.txt").write_text("1 2")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    cases = {
        "cat": "numbers of classes", "-1": "numbers of classes", "": "numbers of classes", "1,2,3": "3 labels for 2",
        "halves.npy": "whole numbers", "objects.npy": "can't read", "two.npz": "arr_1", "words.txt": "whole numbers",
        "none.txt": "can't read", "cut.npz": "can't read",
    }  # fmt: skip
    for given, reason in cases.items():
        with pytest.raises(DataError, match=reason):
            read_labels(str(tmp_path / given) if "." in given else given, 2)
    with pytest.raises(DataError, match="2 labels for 3 images"):
        read_labels(str(tmp_path / "short.txt"), 3)
    for labels in ([True], [[1]], ["a"], [[1], [1, 2]], [-1]):
        with pytest.raises(DataError):
            check_labels(labels, 1, 10)

"""Readers refuse anything off before allocating; draws are stratified, nested and reproducible."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from grafting.data import DataSource, ImageLabelDataset, as_data, load_dataset
from grafting.data.fashion import load_full, packaged_subset, to_pixels
from grafting.data.idx import read_idx
from grafting.data.npz import NpzReader
from grafting.data.stratify import apportion, stratified_indices
from grafting.errors import DataError


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)


@pytest.fixture
def dataset() -> ImageLabelDataset:
    x = torch.arange(100, dtype=torch.float32).reshape(100, 1, 1, 1).expand(100, 2, 3, 3)
    y = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    return ImageLabelDataset(x, y, name="toy", num_classes=4)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path: Path, images: np.ndarray, zipped: bool) -> None:
    data = idx_bytes(images)
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert np.array_equal(read_idx(path), images)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG", "not an IDX file"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 0), "type 0x0d"),
        (b"\0\0\x08\x09", "9 dimensions"),
        (b"\0\0\x08\x00", "0 dimensions"),
        (b"\0\0\x08\x03\0\0", "ends inside its header"),
        (b"\0\0\x08\x03" + struct.pack(">III", *[0xFFFFFFFF] * 3), "more than the limit"),
        (b"\0\0\x08\x01" + struct.pack(">I", 1 << 29), "too short"),
        (b"\0\0\x08\x01" + struct.pack(">I", 4) + b"abc", "holds 3 of the 4"),
        (b"\0\0\x08\x01" + struct.pack(">I", 2) + b"abc", "holds more"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_refuses_hostile_files(tmp_path: Path, data: bytes, reason: str, zipped: bool) -> None:
    path = tmp_path / "bad"
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(DataError, match=reason) as caught:
        read_idx(path)
    assert "\n" not in str(caught.value)


def test_idx_refuses_a_cut_gzip_and_a_missing_file(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(idx_bytes(images))[:-500])
    with pytest.raises(DataError, match="cannot read"):
        read_idx(path)
    with pytest.raises(DataError, match="cannot read"):
        read_idx(tmp_path / "none")


def test_to_pixels_pads_with_black_and_scales(images: np.ndarray) -> None:
    images[0, 0, 0], images[0, 0, 1], images[0, 0, 2] = 0, 255, 51
    x = to_pixels(images)
    assert x.shape == (20, 1, 32, 32)
    assert x.dtype == torch.float32
    assert (x[:, :, :2] == -1).all()
    assert (x[:, :, :, 30:] == -1).all()
    torch.testing.assert_close(x[0, 0, 2, 2:5], torch.tensor([-1.0, 1.0, -0.6]))
    assert torch.equal(x[:, 0, 2:30, 2:30], torch.from_numpy(images).float() / 127.5 - 1)
    with pytest.raises(DataError, match="uint8"):
        to_pixels(images[:, :27])


def test_packaged_subset_is_stratified_and_named() -> None:
    images, labels = packaged_subset()
    assert images.shape == (6000, 28, 28)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [600] * 10
    assert len(np.unique(images.reshape(6000, -1), axis=0)) > 5990
    data: DataSource = load_dataset("fashion-10")
    assert (data.name, len(data), data.shape, data.num_classes) == ("fashion-10", 6000, (1, 32, 32), 10)
    x, y = data.batch([5, 3, 5])
    assert torch.equal(x, to_pixels(images[[5, 3, 5]]))
    assert y.tolist() == labels[[5, 3, 5]].tolist()


def test_packaged_subset_hash_is_pinned() -> None:
    assert load_dataset("fashion-10").content_hash.startswith("e50bebd6d3bc4f1d")


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_stratified_draws_are_exact(counts: list[int], share: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    total = max(1, round(share * len(labels)))
    chosen = stratified_indices(labels, total, seed=seed, purpose="test")
    assert len(np.unique(chosen)) == total
    assert np.all(np.diff(chosen) > 0)
    drawn = np.bincount(labels[chosen], minlength=len(counts))
    exact = np.array(counts) * total / len(labels)
    assert np.abs(drawn - exact).max() < 1
    assert apportion(np.array(counts), total).sum() == total


def test_subset_is_stratified_nested_and_reproducible(dataset: ImageLabelDataset) -> None:
    small, large = dataset.subset(0.1, seed=3), dataset.subset(0.5, seed=3)
    assert small.y.bincount().tolist() == [5, 3, 2]
    assert large.y.bincount().tolist() == [25, 15, 10]
    assert set(small.x[:, 0, 0, 0].tolist()) < set(large.x[:, 0, 0, 0].tolist())
    assert small.content_hash == dataset.subset(0.1, seed=3).content_hash
    assert small.content_hash != dataset.subset(0.1, seed=4).content_hash
    assert small.num_classes == 4
    with pytest.raises(DataError, match="fraction"):
        dataset.subset(0.0)


def test_split_holds_out_every_class_once(dataset: ImageLabelDataset) -> None:
    train, validation = dataset.split(10, seed=1)
    assert validation.y.bincount().tolist() == [5, 3, 2]
    together = sorted(train.x[:, 0, 0, 0].tolist() + validation.x[:, 0, 0, 0].tolist())
    assert together == [float(i) for i in range(100)]
    for num in (0, 100, -1):
        with pytest.raises(DataError, match="hold out"):
            dataset.split(num)


def test_content_hash_sees_every_part() -> None:
    x, y = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2])
    first = ImageLabelDataset(x, y)
    assert first.content_hash == ImageLabelDataset(x.clone(), y.int(), name="other").content_hash
    changed = x.clone()
    changed[2, 0, 1, 1] = 1e-30
    others = [
        ImageLabelDataset(changed, y),
        ImageLabelDataset(x, y.flip(0)),
        ImageLabelDataset(x.half(), y),
        ImageLabelDataset(x.reshape(3, 2, 2, 1), y),
        ImageLabelDataset(x, y, num_classes=4),
    ]
    assert len({first.content_hash, *(other.content_hash for other in others)}) == 6


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(2).long(), r"\[N, C, H, W\]"),
        (torch.zeros(0, 1, 3, 3), torch.zeros(0).long(), r"N >= 1"),
        (torch.zeros(2, 1, 3, 3).int(), torch.zeros(2).long(), "floating point, got int32"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(3).long(), r"labels must be \[2\]"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(2), "integers"),
        (torch.zeros(2, 1, 3, 3), torch.tensor([0, 10]), r"0..9, got 0..10"),
        (torch.zeros(2, 1, 3, 3), torch.tensor([-1, 1]), r"got -1..1"),
        (torch.full((2, 1, 3, 3), torch.nan), torch.zeros(2).long(), "example 0 .* not finite"),
        (
            torch.tensor([0.0, torch.inf]).reshape(2, 1, 1, 1),
            torch.zeros(2).long(),
            "example 1 .* not finite",
        ),
    ],
)
def test_dataset_says_what_is_wrong(x: torch.Tensor, y: torch.Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        ImageLabelDataset(x, y, num_classes=10)


def test_floating_pixels_that_are_grey_levels_are_refused() -> None:
    grey, y = torch.tensor([0.0, 255.0, 30.0, 7.0]).reshape(2, 1, 1, 2), torch.zeros(2).long()
    said = (
        r"of 1 channel with values 0 to 255; pixels are expected in \[-1, 1\]: give uint8, or x / 127\.5 - 1"
    )
    with pytest.raises(DataError, match=said):
        ImageLabelDataset(grey, y)
    with pytest.raises(DataError, match="of 3 channels"):
        as_data([(image.expand(3, 1, 2), 0) for image in grey.half()])
    for taken in (grey.to(torch.uint8), grey / 127.5 - 1, grey / 255, grey.expand(2, 4, 1, 2), grey / 10 - 3):
        data = ImageLabelDataset(taken, y)
        assert len(data.subset(0.5)) == 1  # of which one example may look otherwise than all
    mixed = torch.tensor([-0.5, 9.0]).reshape(2, 1, 1, 1)
    train, held = ImageLabelDataset(mixed, y).split(1)
    assert len(train) == len(held) == 1


def test_dataset_checks_indices_and_models(dataset: ImageLabelDataset) -> None:
    for bad in ([100], [-1], [0, 1000]):
        with pytest.raises(DataError, match=r"outside 0\.\.99"):
            dataset.batch(bad)
    dataset.check_against(2, 3, 4)
    dataset.check_against(2, 3, 10)
    with pytest.raises(DataError, match=r"\[2, 3, 3\] but the model takes \[1, 3, 3\]"):
        dataset.check_against(1, 3, 4)
    with pytest.raises(DataError, match="4 classes but the model knows 3"):
        dataset.check_against(2, 3, 3)


def test_load_idx_folder(tmp_path: Path, images: np.ndarray) -> None:
    labels = np.arange(20, dtype=np.uint8) % 10
    write_fashion(tmp_path, images, labels)
    for source in (tmp_path, str(tmp_path), f"fashion:{tmp_path}"):
        data = load_dataset(source)
        assert torch.equal(data.x, to_pixels(images))
        assert data.y.tolist() == labels.tolist()
    with pytest.raises(DataError, match="no t10k-images"):
        load_dataset(f"fashion:{tmp_path}:test")
    with pytest.raises(DataError, match="unknown split"):
        load_full(tmp_path, "valid")
    write_fashion(tmp_path, images, labels + 5)
    with pytest.raises(DataError, match=r"must be 0\.\.9"):
        load_full(tmp_path)
    write_fashion(tmp_path, images, labels[:-1])
    with pytest.raises(DataError, match="do not fit"):
        load_full(tmp_path)


def test_load_npz_of_both_layouts(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "grey.npz", arr_0=grey, arr_1=np.array([0, 1, 2, 3, 4], dtype=np.uint8))
    data = load_dataset(tmp_path / "grey.npz")
    assert data.shape == (3, 4, 6)
    torch.testing.assert_close(data.x, torch.from_numpy(grey).permute(0, 3, 1, 2).float() / 127.5 - 1)
    latents = np.random.default_rng(1).normal(size=(5, 4, 6, 6)).astype(">f4")
    np.savez(tmp_path / "latents.npz", arr_0=latents, arr_1=np.arange(5))
    assert np.array_equal(load_dataset(tmp_path / "latents.npz").x.numpy(), latents)


def test_load_safetensors_latents(tmp_path: Path) -> None:
    x, y = torch.randn(6, 4, 8, 8).half(), torch.arange(6)
    save_file({"x": x, "y": y}, tmp_path / "l.safetensors", metadata={"num_classes": "1000", "name": "tiny"})
    data = load_dataset(tmp_path / "l.safetensors")
    assert (data.name, data.num_classes, data.shape) == ("tiny", 1000, (4, 8, 8))
    assert torch.equal(data.batch([1])[0], x[1:2].float())
    save_file({"x": x}, tmp_path / "no_y.safetensors")
    save_file({"x": x, "y": y}, tmp_path / "bad.safetensors", metadata={"num_classes": "many"})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "l.safetensors").read_bytes()[:200])
    for name, reason in (("no_y", "holds x"), ("bad", "expected a number"), ("cut", "cannot read")):
        with pytest.raises(DataError, match=reason):
            load_dataset(tmp_path / f"{name}.safetensors")


def test_load_dataset_names_what_it_can_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fashion-10"):
        load_dataset("fashion-11")
    with pytest.raises(DataError, match="train-images"):
        load_dataset(tmp_path)
    (tmp_path / "data.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\.npz or \.safetensors"):
        load_dataset(tmp_path / "data.bin")


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def npy(descr: str, shape: tuple[int, ...], data: bytes) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


def zip_of(path: Path, data: bytes, name: str = "arr_0.npy", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, data)
    return path


def test_npz_never_unpickles(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    objects = np.empty(1, dtype=object)
    objects[0] = Payload(trap)
    np.savez(tmp_path / "objects.npz", arr_0=objects)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Payload(trap)))
    zip_of(tmp_path / "hidden.npz", pickle.dumps(Payload(trap)))
    for name in ("objects", "bare", "hidden"):
        with pytest.raises(DataError):
            load_dataset(tmp_path / f"{name}.npz")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy("|u1", (1 << 40, 1 << 40), b""), "data bytes"),
        (npy("|u1", (10,), b"123"), "data bytes"),
        (npy("|u1", (3,), b"12345"), "data bytes"),
        (npy("|u1", (-3,), b""), "data bytes"),
        (npy("|V8", (1,), b"12345678"), "expected numbers"),
        (b"\x93NUMPY\x01\x00\xff\xff{}", "damaged header"),
        (b"\x93NUMPY\x07\x00", "version"),
        (b"nonsense", "damaged header"),
    ],
)
def test_npz_refuses_hostile_headers(tmp_path: Path, data: bytes, reason: str) -> None:
    path = zip_of(tmp_path / "bad.npz", data)
    with pytest.raises(DataError, match=reason) as caught:
        NpzReader(path)
    assert "\n" not in str(caught.value)


def test_npz_refuses_hostile_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", arr_0=np.arange(4000))
    data = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    middle = bytearray(data)
    middle[2000] ^= 255
    (tmp_path / "flipped.npz").write_bytes(bytes(middle))
    zip_of(tmp_path / "foreign.npz", b"hello", name="readme.txt")
    zip_of(tmp_path / "lzma.npz", npy("|u1", (3,), b"123"), method=zipfile.ZIP_LZMA)
    with zipfile.ZipFile(tmp_path / "many.npz", "w") as archive:
        for i in range(100):
            archive.writestr(f"a{i}.npy", npy("|u1", (1,), b"1"))
    for name in ("cut", "flipped", "foreign", "lzma", "many", "missing"):
        with pytest.raises(DataError):
            NpzReader(tmp_path / f"{name}.npz").read("arr_0")
    with pytest.raises(DataError, match="holds: arr_0"):
        NpzReader(tmp_path / "good.npz").read("arr_7")
    with pytest.raises(DataError, match="limit is 100"):
        NpzReader(tmp_path / "good.npz").read("arr_0", max_bytes=100)
    with pytest.raises(DataError, match="limit is 100"):
        NpzReader(tmp_path / "good.npz", max_bytes=100)


def test_npz_slices_equal_the_whole(tmp_path: Path) -> None:
    array = np.arange(7 * 5).reshape(7, 5)
    np.savez_compressed(tmp_path / "a.npz", a=array)
    parts = list(NpzReader(tmp_path / "a.npz").slices("a", 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert np.array_equal(np.concatenate(parts), array)

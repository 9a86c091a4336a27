"""Files of strangers: generated damage, and files that were made to do harm. Only GraftError may come of them."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit

from grafting import GraftPlan, Replace, graft, load_graft, load_model, save_graft, save_model
from grafting.data import load_dataset
from grafting.data.npz import NpzReader
from grafting.errors import CheckpointError, DataError, GraftError
from grafting.formats import weights
from grafting.formats.published import import_published, load_published
from grafting.models.dit import DiTConfig

CHAOS = Path(__file__).resolve().parents[1] / "scripts" / "chaos"
NUM = 150


@pytest.fixture(scope="module")
def inputs() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(CHAOS), *sys.path])  # as for a script of that folder
        return importlib.import_module("inputs")


@pytest.fixture(scope="module")
def world(inputs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return inputs.make_world(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", ["plan", "selector", "pt", "safetensors", "graft", "npz"])
def test_generated_input_is_read_or_refused_in_one_line(inputs: ModuleType, world: Any, name: str) -> None:
    make, read = inputs.READERS[name]
    accepted, refusals = 0, []
    for number in range(NUM):
        content = make(world, random.Random(f"test/{name}/{number}"))
        try:
            read(world, content)
            accepted += 1
        except GraftError as error:
            refusals.append(str(error))
    assert not [text for text in refusals if "\n" in text or len(text) > 2000]
    assert 0 < accepted < NUM  # damage that is neither all fatal nor all harmless


# ---- .pt


def with_pickle(path: Path, data: bytes, method: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """A file of torch.save in which data.pkl is another."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith("data.pkl") else source.read(name))
        for name, content in members.items():
            target.writestr(name, content)
    return path


def test_tuples_that_double_are_not_built(tmp_path: Path) -> None:
    nested: Any = ()
    for _ in range(80):
        nested = (nested, nested)
    key = pickle.dumps(nested, 2)[2:-1]
    path = with_pickle(tmp_path / "x.pt", b"\x80\x02}" + key + b"K\x01s.")
    with pytest.raises(CheckpointError, match="more than 1000000 parts"):
        weights.read_pickled(path)
    (tmp_path / "y.pt").write_bytes(b"\x80\x02}" + key + b"K\x01s.")  # the old form
    with pytest.raises(CheckpointError, match="more than 1000000 parts"):
        weights.read_pickled(tmp_path / "y.pt")


def test_archives_that_unpack_to_more_than_they_are_are_not_unpacked(tmp_path: Path) -> None:
    path = with_pickle(
        tmp_path / "x.pt", b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"archive/data/9": bytes(10**7)}
    )
    with pytest.raises(CheckpointError, match="compressed members"):
        weights.read_pickled(path)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1).expand(10**12), r"claims shape \[1000000000000\] of a smaller storage"),
        (torch.empty(10**6, 10**6, device="meta"), "on meta"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "float8"),
        ([torch.zeros(200_000)] * 99, "more than 4 times the file"),
    ],
    ids=["expanded", "meta", "sparse", "complex", "float8", "aliases"],
)
def test_tensors_that_are_not_what_they_seem_are_refused(tmp_path: Path, tensor: Any, reason: str) -> None:
    content = (
        {str(i): t.view_as(t) for i, t in enumerate(tensor)} if isinstance(tensor, list) else {"a": tensor}
    )
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=reason):
        weights.read_pickled(tmp_path / "x.pt")


@pytest.mark.parametrize("read", [load_published, import_published])
def test_shapes_that_do_not_fit_cost_nothing(tmp_path: Path, read: Callable[..., Any]) -> None:
    """One small tensor claims a width whose attention would take terabytes."""
    state = tiny_dit().state_dict()
    state["x_embedder.proj.weight"] = torch.zeros(1 << 19, 1, 1, 1)
    state["final_layer.linear.weight"] = torch.zeros(2, 32)
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="shape"):
        read(tmp_path / "x.pt", num_heads=4)


# ---- safetensors


@pytest.mark.parametrize("size", [2**63, 2**40, 2**26, 10**5])
def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}" + bytes(1000))
    for read, error in ((weights.read_safetensors, CheckpointError), (load_dataset, DataError)):
        with pytest.raises(error, match=f"claims {size} bytes"):
            read(path)


@pytest.mark.parametrize("shape", [[10**12], [2**62, 4], [-1], [0.5], "x"], ids=str)
def test_a_tensor_that_claims_terabytes_is_refused(tmp_path: Path, shape: Any) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    for read, error in ((weights.read_safetensors, CheckpointError), (load_dataset, DataError)):
        with pytest.raises(error):
            read(path)


# ---- grafts and saved models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    student = graft(tiny_dit(), GraftPlan([Replace("mha", [1], "hyena_x")]))
    for parameter in student.parameters():
        parameter.data = parameter.data + 0.01
    save_graft(student, tmp_path / "graft")
    save_model(tiny_dit(), tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("name", ["graft/graft.json", "model/model.json"])
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**19}, {"depth": 4000}, {"depth": 10**30}, {"input_size": 2**19, "patch_size": 1},
        {"input_size": 4096, "patch_size": 1}, {"num_classes": 10**6}, {"mlp_ratio": 1e5}, {"latent_size": [10**6, 1]},
        {"hidden_size": "x"}, {"num_heads": 4.0}, {"family": "x" * 9999}, {"../../x": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_architecture_that_its_tensors_do_not_fit_is_refused(
    folder: Path, name: str, change: dict[str, Any]
) -> None:
    manifest = json.loads((folder / name).read_text())
    manifest["architecture"] |= change
    (folder / name).write_text(json.dumps(manifest))
    with pytest.raises(GraftError) as caught:
        load_model((folder / name).parent)
    assert len(str(caught.value)) < 1000


def test_a_graft_can_t_name_a_file_outside_of_its_folder(folder: Path) -> None:
    path = folder / "graft/graft.json"
    manifest = json.loads(path.read_text())
    for sha256 in ("../../../etc/passwd", "x" * 64, "A" * 64, "0" * 63, f"{'0' * 12}/../x"):
        manifest["tensors"]["sha256"] = sha256
        path.write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="has no hash"):
            load_graft(folder / "graft")


def test_an_operator_that_can_t_be_built_is_an_error_that_names_it() -> None:
    for config in ({"ratio": 1e30}, {"ratio": 2**70}):
        with pytest.raises(GraftError, match="mlp"):
            graft(tiny_dit(), GraftPlan([Replace("mlp", [0], "mlp", config)]))
    with pytest.raises(GraftError, match="position table"):
        DiTConfig(input_size=2**19, patch_size=1)


# ---- npz


def npy(header: bytes, version: int = 1) -> bytes:
    return (
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + bytes(10**6), "claims 4294967295 bytes"),
        (npy(b"(" * 9000), "damaged header"),
        (npy(b"{'descr': '<f4'"), "damaged header"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"), "claims shape"),
        (npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"), "pickled objects are not read"),
        (b"PK", "does not begin"),
    ],
    ids=["length", "nested", "open", "terabytes", "object", "other"],
)
def test_arrays_that_claim_too_much_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", content)
    with pytest.raises(DataError, match=reason):
        load_dataset(tmp_path / "x.npz")


def test_an_archive_bomb_is_told_by_its_ratio(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (300000000,), }\n"))
        for _ in range(300):
            file.write(bytes(10**6))
    assert (tmp_path / "x.npz").stat().st_size < 10**6
    with pytest.raises(DataError, match="a bomb"):
        NpzReader(tmp_path / "x.npz")


def test_zeros_that_compress_well_are_still_data(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", arr_0=np.zeros((10, 64, 64, 3), np.uint8), arr_1=np.arange(10))
    assert len(load_dataset(tmp_path / "x.npz")) == 10

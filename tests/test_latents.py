"""Folders of latents as data: values, subsets and splits with their hashes, damage, and what a run makes of them."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from latent_tools import config, files, make_world, save_vae
from safetensors.torch import load_file

from grafting import save_model
from grafting.console import Console
from grafting.data import LatentDataset, encode_images, load_dataset
from grafting.data.manifest import content_hash
from grafting.data.shards import write_tensors
from grafting.errors import DataError, GraftError
from grafting.pipeline import Pipeline
from grafting.recipes import Recipe, load_recipe
from grafting.runs import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def data(world: Path) -> LatentDataset:
    found = load_dataset(world / "whole")
    assert isinstance(found, LatentDataset)
    return found


def test_examples_by_index_are_those_of_the_files(world: Path, data: LatentDataset) -> None:
    shards = [load_file(path) for path in sorted((world / "whole").glob("*.safetensors"))]
    x = torch.cat([shard[name] for name in ("x", "x_flip") for shard in shards]).float()
    y = torch.cat([shard["y"] for shard in shards]).repeat(2)
    assert (len(data), data.shape, data.num_classes) == (22, (4, 8, 8), 3)
    index = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    found, labels = data.batch(index)
    assert torch.equal(found, x[index])
    assert torch.equal(labels, y[index])
    assert torch.equal(data.y, y)
    assert found.dtype == torch.float32
    assert torch.equal(pickle.loads(pickle.dumps(data)).batch(index)[0], found)
    for wrong in (-1, 22):
        with pytest.raises(DataError, match=r"outside 0\.\.21"):
            data.batch([0, wrong])
    assert data.batch([])[0].shape == (0, 4, 8, 8)


def test_nothing_is_read_but_what_is_asked_for(world: Path, tmp_path: Path) -> None:
    """More open shards than maps are kept: still the same values."""
    encode_images(world / "images", tmp_path / "z", config(world, shard_size=1))
    many = LatentDataset.open(tmp_path / "z")
    few = LatentDataset.open(world / "whole")
    import grafting.data.latents as latents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "_MAX_OPEN", 2)
        index = [21, 0, 5, 16, 3, 3, 9]
        torch.testing.assert_close(many.batch(index)[0], few.batch(index)[0], atol=2e-3, rtol=2e-3)
        assert len(many._maps) == 2


def test_a_subset_is_stratified_has_both_views_and_a_hash_of_its_own(data: LatentDataset) -> None:
    half = data.subset(0.5, seed=3)
    assert len(half) == 12  # 6 of 11 images, twice
    assert sorted(half.y[:6].tolist()) in ([0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 2, 2])
    rows = half._rows
    for view in range(2):
        found = half.batch(range(view * 6, view * 6 + 6))[0]
        assert torch.equal(found, data.batch(rows + 11 * view)[0])
    assert half.content_hash == data.subset(0.5, seed=3).content_hash
    hashes = {
        data.content_hash,
        half.content_hash,
        data.subset(0.5, seed=4).content_hash,
        data.subset(0.2).content_hash,
    }
    assert len(hashes) == 4
    assert data.subset(1.0).content_hash == data.content_hash == data.manifest.sha256
    assert half.name == "whole[0.5, seed 3]"
    assert half.subset(0.5).subset(1e-9).shape == data.shape
    for wrong in (0.0, 1.1, float("nan")):
        with pytest.raises(DataError, match="fraction"):
            data.subset(wrong)


def test_an_image_and_its_mirror_image_are_on_one_side_of_a_split(data: LatentDataset) -> None:
    train, held = data.split(5)
    assert (len(train), len(held)) == (16, 6)
    assert not set(train._rows) & set(held._rows)
    assert set(train._rows) | set(held._rows) == set(range(11))
    assert len({train.content_hash, held.content_hash, data.content_hash}) == 3
    with pytest.raises(DataError, match="hold out"):
        data.split(22)


def test_the_hash_is_of_what_the_latents_are(world: Path, data: LatentDataset, tmp_path: Path) -> None:
    other = encode_images(world / "images", tmp_path / "z", config(world, seed=1))
    assert other is not None
    assert other.sha256 != data.manifest.sha256
    data.verify()


# ---- damage


def edited(world: Path, folder: Path, change: Any, *, rehash: bool = True) -> Path:
    """A copy of the latents with a changed manifest."""
    folder.mkdir()
    for name, content in files(world / "whole").items():
        (folder / name).write_bytes(content)
    manifest = json.loads((folder / "latents.json").read_text())
    change(manifest)
    if rehash:
        manifest["sha256"] = content_hash(manifest)
    (folder / "latents.json").write_text(json.dumps(manifest))
    return folder


def put(*place: Any) -> Any:
    """A change of one value of a manifest."""
    *keys, last, value = place

    def change(manifest: Any) -> None:
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (put("version", 2), "version"),
        (put("format", "other"), "format"),
        (put("extra", 1), "extra"),
        (put("shards", 0, "file", "../secret.safetensors"), r"shards\.0\.file"),
        (put("shards", 0, "file", "/etc/passwd"), r"shards\.0\.file"),
        (put("shards", 0, "file", "missing.safetensors"), "is missing"),
        (put("shards", 0, "file", "latents-00001.safetensors"), "twice"),
        (put("shards", 0, "num", 10**14), "the shards hold"),
        (put("shards", 0, "size", 10**14), "the manifest says"),
        (put("shape", [4, 16, 16]), "the manifest says"),
        (put("shape", [4, 10**9, 10**9]), "shape"),
        (put("dtype", "bfloat16"), "the manifest says"),
        (put("flip", False), "the manifest says"),
        (put("num_classes", 2), "labels are 0..2"),
        (put("vae", "scaling_factor", "NaN"), "scaling_factor"),
    ],
    ids=range(15),
)
def test_a_manifest_that_is_not_right_is_refused(world: Path, tmp_path: Path, change: Any, word: str) -> None:
    with pytest.raises(DataError, match=word):
        load_dataset(edited(world, tmp_path / "z", change))


def test_an_edit_by_hand_is_noticed(world: Path, tmp_path: Path) -> None:
    folder = edited(world, tmp_path / "z", put("shards", 0, "sha256", "0" * 64), rehash=False)
    with pytest.raises(DataError, match="changed by hand"):
        load_dataset(folder)
    folder = edited(world, tmp_path / "y", put("shards", 0, "sha256", "0" * 64))
    with pytest.raises(DataError, match=r"latents-00000\.safetensors is damaged"):
        LatentDataset.open(folder).verify()


def test_a_shard_that_is_not_right_is_refused(world: Path, tmp_path: Path) -> None:
    folder = edited(world, tmp_path / "z", lambda manifest: None)
    path = folder / "latents-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"has {len(whole) - 1} bytes, the manifest says {len(whole)}"):
        load_dataset(folder)
    for header in (
        b"{", b"[]", b'{"x": 1}', b'{"x": {"dtype": "F16", "shape": [1099511627776, 4], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F16", "shape": [4], "data_offsets": [8, 0]}}', b"[" * 5000,
        b'{"x": {"dtype": "F16", "shape": [-4], "data_offsets": [0, -8]}}',
    ):  # fmt: skip
        path.write_bytes((len(header).to_bytes(8, "little") + header).ljust(len(whole), b"\0")[: len(whole)])
        with pytest.raises(DataError):
            load_dataset(folder)
    path.write_bytes((2**60).to_bytes(8, "little").ljust(len(whole), b"\0"))
    with pytest.raises(DataError, match="no credible length"):
        load_dataset(folder)


def test_whatever_byte_is_changed_there_is_data_or_one_error(world: Path, tmp_path: Path) -> None:
    folder = edited(world, tmp_path / "z", lambda manifest: None)
    generator = random.Random(0)
    for name in ("latents-00001.safetensors", "latents.json"):
        whole = (folder / name).read_bytes()
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(generator.randrange(1, 4)):
                content[generator.randrange(min(len(content), 400))] = generator.randrange(256)
            (folder / name).write_bytes(content)
            try:
                found = load_dataset(folder)
                found.batch(range(len(found)))
            except GraftError:
                pass
        (folder / name).write_bytes(whole)
    load_dataset(folder)


def test_latents_that_are_not_finite_are_refused(world: Path, tmp_path: Path) -> None:
    folder = edited(world, tmp_path / "z", lambda manifest: None)
    tensors = load_file(folder / "latents-00000.safetensors")
    tensors["x"][2, 0, 0, 0] = float("nan")
    order = {name: tensors[name] for name in ("y", "index", "x", "x_flip")}
    write_tensors(folder / "latents-00000.safetensors", order, {"format": "grafting-latents"})
    with pytest.raises(DataError, match="not finite"):
        load_dataset(folder).batch(range(11))


# ---- in a run


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    teacher = tiny_dit(depth=2, hidden_size=16, patch_size=4, in_channels=4, num_classes=3)
    save_model(teacher, world / "model")
    quick = {"steps": 2, "batch_size": 4, "num_validation": 2, "warmup": 0, "precision": "fp32"}
    return load_recipe({
        "model": str(world / "model"), "data": str(world / "whole"), "evaluate": None, "fraction": 0.5, "seed": 3,
        "plan": [{"replace": {"target": "mha", "layers": [1], "with": "hyena_x"}}],
        "distill": quick | {"fit_samples": 8}, "finetune": quick,
        "sample": {"num": 2, "steps": 2, "vae": str(world / "vae")},
    })  # fmt: skip


def test_a_run_on_latents_records_the_hash_of_its_subset(
    world: Path, data: LatentDataset, recipe: Recipe, tmp_path: Path
) -> None:
    pipeline = Pipeline(recipe, RunFolder(tmp_path / "run"))
    pipeline.check()
    pipeline.run = RunFolder.create(tmp_path / "run", recipe.to_dict(), Console(quiet=True))
    pipeline.all()
    recorded = pipeline.run.read()["inputs"]["data"]
    subset = data.subset(0.5, seed=3)
    assert recorded["sha256"] == subset.content_hash
    assert recorded["name"] == "whole[0.5, seed 3]"
    assert np.load(tmp_path / "run" / "samples" / "student.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_latents_of_another_vae_or_size_are_refused(world: Path, recipe: Recipe, tmp_path: Path) -> None:
    def check(**changes: Any) -> None:
        Pipeline(recipe.model_copy(update=changes), RunFolder(tmp_path / "run")).check()

    check()
    copied = tmp_path / "pipeline" / "vae"  # the same weights in another place, as a part of a pipeline
    save_vae(copied)
    check(sample=recipe.sample.model_copy(update={"vae": str(copied.parent)}))
    for name, seed, scaling in (("weights", 1, 0.5), ("scaling", 0, 0.25)):
        save_vae(tmp_path / name, seed=seed, scaling=scaling)
        with pytest.raises(
            DataError, match=rf"encoded with the VAE .*{name}'; encode .*--vae .*sample\.vae="
        ):
            check(sample=recipe.sample.model_copy(update={"vae": str(tmp_path / name)}))
    encode_images(world / "images", tmp_path / "large", config(world, size=32))
    with pytest.raises(DataError, match=r"\[4, 16, 16\].*\[4, 8, 8\]"):
        check(data=str(tmp_path / "large"))

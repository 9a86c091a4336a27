"""Our own folders: what is read back is what was written, and damage is named."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prediction, tiny_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_tools import states_equal as equal_states
from torch import nn

from grafting import GraftPlan, Replace, explain, graft, load_graft, load_model, save_graft, save_model
from grafting.errors import CheckpointError, GraftError
from grafting.formats import weights
from grafting.surgery import record_of

HALF = GraftPlan([Replace("mha", [1, 3], "hyena_x")])


def test_a_saved_model_is_read_back(tmp_path: Path, model: nn.Module) -> None:
    save_model(model, tmp_path / "m")
    assert equal_states(load_model(tmp_path / "m"), model)
    with pytest.raises(GraftError, match="save_graft"):
        save_model(graft(model, HALF), tmp_path / "n")
    with pytest.raises(CheckpointError, match="no plan"):
        save_graft(model, tmp_path / "n")
    assert not (tmp_path / "n").exists()


def saved(tmp_path: Path, model: nn.Module, plan: GraftPlan = HALF) -> tuple[nn.Module, Path]:
    """A graft of a model that is itself on disk, and its folder."""
    save_model(model, tmp_path / "base")
    student = graft(load_model(tmp_path / "base"), plan)
    save_graft(student, tmp_path / "graft")
    return student, tmp_path / "graft"


def test_only_what_differs_is_stored_and_the_base_is_found(tmp_path: Path, model: nn.Module) -> None:
    student, folder = saved(tmp_path, model)
    manifest = json.loads((folder / "graft.json").read_text())
    tensors = weights.read_safetensors(next(folder.glob("*.safetensors")))
    assert {name.split(".attn")[0] for name in tensors} == {"blocks.1", "blocks.3"}
    assert set(tensors) == set(student.state_dict()) - set(model.state_dict()) | {
        n for n in tensors if not torch.equal(tensors[n], model.state_dict().get(n, torch.zeros(0)))
    }
    assert manifest["base"]["source"] == str(tmp_path / "base")
    assert manifest["plan"]["entries"][0]["replace"]["layers"] == [1, 3]  # numbers, no selectors
    assert (manifest["format"], manifest["version"]) == ("grafting", 1)
    for loaded in (
        load_graft(folder),
        load_graft(folder, base=model),
        load_model(folder),
        load_model(tmp_path),
    ):
        assert equal_states(loaded, student)
        assert record_of(loaded).plan == record_of(student).plan


def test_a_trained_part_is_stored_and_nothing_else(tmp_path: Path, model: nn.Module) -> None:
    student = graft(model, HALF)
    with torch.no_grad():
        student.blocks[2].mlp.fc1.bias.add_(1.0)
    save_graft(student, tmp_path)
    tensors = weights.read_safetensors(next(tmp_path.glob("*.safetensors")))
    assert "blocks.2.mlp.fc1.bias" in tensors
    assert not any(name.startswith(("blocks.0", "final", "blocks.2.mlp.fc2")) for name in tensors)
    assert equal_states(load_graft(tmp_path, base=model), student)


def test_a_graft_with_weights_back_at_the_base_s_is_still_itself(tmp_path: Path, model: nn.Module) -> None:
    """A tensor that equals the base's is not stored, also where the plan would draw it anew."""
    student = graft(model, GraftPlan([Replace("mha", [1], "mha", init="random")]))
    student.blocks[1].attn.load_state_dict(model.blocks[1].attn.state_dict())
    save_graft(student, tmp_path)
    assert equal_states(load_graft(tmp_path, base=model), student)
    assert equal_states(load_graft(tmp_path, base=model), model)


def test_a_fully_finetuned_graft_needs_no_base(tmp_path: Path, model: nn.Module) -> None:
    student = graft(model, HALF)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    save_graft(student, tmp_path)
    assert json.loads((tmp_path / "graft.json").read_text())["base"] is None
    loaded = load_graft(tmp_path)
    assert equal_states(loaded, student)
    assert record_of(loaded).plan == record_of(student).plan
    save_graft(loaded, tmp_path / "again")
    assert equal_states(load_graft(tmp_path / "again"), student)


def test_a_graft_of_a_bf16_base_finds_it(tmp_path: Path, model: nn.Module) -> None:
    save_model(model, tmp_path / "base")
    student = graft(load_model(tmp_path / "base", dtype=torch.bfloat16), HALF)
    save_graft(student, tmp_path / "graft")
    loaded = load_graft(tmp_path / "graft")
    assert equal_states(loaded, student)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    full = load_graft(tmp_path / "graft", dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}


def test_a_self_contained_graft_keeps_its_dtype(tmp_path: Path, model: nn.Module) -> None:
    student = graft(model, HALF).to(torch.bfloat16)
    save_graft(student, tmp_path)
    loaded = load_graft(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert equal_states(loaded, student)


_CHOICES = {
    "mha": [("hyena_se", {"kernel_size": 3}), ("hyena_x", {}), ("hyena_y", {}), ("swa", {"window": 1}),
            ("mamba2", {"d_state": 8, "head_dim": 8}), ("mha", {})],
    "mlp": [("mlp", {"ratio": 2}), ("mlp", {"ratio": 6}), ("mlp_hyena_x", {})],
}  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(draw=st.data(), seed=st.integers(0, 2**31 - 1))
def test_any_mix_of_operators_explains_grafts_saves_and_loads(draw: st.DataObject, seed: int) -> None:
    import tempfile

    entries = []
    for target, choices in _CHOICES.items():
        for layer in range(4):
            choice = draw.draw(st.sampled_from([None, *choices]))
            init = draw.draw(st.sampled_from(["donor", "random"]))
            entries += [Replace(target, [layer], *choice, init=init)] if choice else []
    if not entries:
        return
    model, plan = tiny_dit(), GraftPlan(entries)
    said, student = explain(model, plan), graft(model, plan, seed=seed)
    assert said.params[1] == sum(p.numel() for p in student.parameters())
    assert prediction(student).isfinite().all()
    with tempfile.TemporaryDirectory() as folder:
        save_graft(student, folder)
        loaded = load_graft(folder, base=model)
        assert equal_states(loaded, student)
        assert record_of(loaded).plan == plan.resolve(4)
        if record_of(loaded).base_digests:  # again from what was loaded, in training or not
            save_graft(loaded, f"{folder}/again")
            assert equal_states(load_graft(f"{folder}/again", base=model), student)


def test_a_wrong_base_is_refused(tmp_path: Path, model: nn.Module) -> None:
    _, folder = saved(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"another base .*base="):
        load_graft(folder, base=tiny_dit(seed=1))
    save_model(tiny_dit(seed=1), tmp_path / "base")  # the base changed under the graft
    with pytest.raises(CheckpointError, match="another base"):
        load_graft(folder)


def test_a_base_that_is_gone_is_named(tmp_path: Path, model: nn.Module) -> None:
    import shutil

    _, folder = saved(tmp_path, model)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="base"):
        load_graft(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap", "gone"])
def test_damaged_graft_tensors_are_refused(tmp_path: Path, model: nn.Module, damage: str) -> None:
    _, folder = saved(tmp_path, model)
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 64
    elif damage == "cut":
        content = content[:-100]
    elif damage == "empty":
        content = bytearray()
    elif damage == "swap":
        tensors = weights.read_safetensors(file)
        name = next(iter(tensors))
        weights.write_safetensors(file, {**tensors, name: tensors[name] + 1})
        content = bytearray(file.read_bytes())
    file.write_bytes(content) if damage != "gone" else file.unlink()
    with pytest.raises(CheckpointError, match=r"graft-.*\.safetensors"):
        load_graft(folder, base=model)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"version": 2}, {"plan": []}, {"plan": {"entries": [{"replace": {}}]}}, {"tensors": {}},
        {"tensors": {"sha256": "../../etc/passwd"}}, {"base": {"sha256": 3}}, {"operators": {"hyena_x": 1}},
        {"architecture": {"family": "unet"}, "base": None},
        {"architecture": {"family": "dit", "depth": "four"}, "base": None},
        {"architecture": {"family": "dit", "color": 1}, "base": None}, {"seed": "x"},
        {"dtype": "complex64"}, {"dtype": ["float32"]}, {"plan": {"version": 9, "entries": []}},
    ],
    ids=str,
)  # fmt: skip
def test_manifests_that_make_no_sense_are_refused(
    tmp_path: Path, model: nn.Module, change: dict[str, Any]
) -> None:
    _, folder = saved(tmp_path, model)
    manifest = json.loads((folder / "graft.json").read_text())
    (folder / "graft.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(GraftError) as caught:
        load_graft(folder, base=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": NaN}', "\x00", "{}" * 3])
def test_manifests_that_are_no_json_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "graft.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"graft\.json"):
        load_graft(tmp_path)


def test_saving_again_leaves_one_set_of_tensors(tmp_path: Path, model: nn.Module) -> None:
    student = graft(model, HALF)
    save_graft(student, tmp_path)
    with torch.no_grad():
        student.blocks[1].attn.out_proj.bias.add_(1)
    save_graft(student, tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert equal_states(load_graft(tmp_path, base=model), student)


def test_a_folder_that_can_t_be_written_is_named(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write"):
        save_graft(graft(model, HALF), tmp_path / "file" / "graft")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    weights.write_json(file, {"a": 1})

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        weights.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_weights_survive_bytes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4).t(),
        "b": torch.arange(3),
        "c": torch.zeros(0),
        "d": torch.tensor(1.5).bfloat16(),
    }
    weights.write_safetensors(tmp_path / "x.safetensors", tensors)
    found = weights.read_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert weights.tensor_digest(tensors["a"]) == weights.tensor_digest(tensors["a"].contiguous())
    assert weights.tensor_digest(torch.zeros(2, 3)) != weights.tensor_digest(torch.zeros(3, 2))
    assert weights.tensor_digest(torch.zeros(2)) != weights.tensor_digest(torch.zeros(2, dtype=torch.int32))
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    assert torch.equal(weights.read_pickled(tmp_path / "x.pt")["a"], tensors["a"])

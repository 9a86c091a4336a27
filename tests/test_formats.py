"""Files in and out: nothing is executed, damage is named, and what is read back is what was written."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, prediction, tiny_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grafting import GraftPlan, Replace, explain, graft, load_graft, load_model, save_graft, save_model
from grafting.errors import CheckpointError, GraftError
from grafting.formats import weights
from grafting.formats.published import export_published, import_published
from grafting.surgery import record_of, source_of

BASE = FIXTURES / "published_format_base.pt"
GRAFTED = FIXTURES / "published_format_grafted_hyena_x.pt"
HALF = GraftPlan([Replace("mha", [1, 3], "hyena_x")])


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


# ---- published files


def test_the_published_files_load_as_they_are(reference: dict[str, Tensor]) -> None:
    base, grafted = load_model(BASE, num_heads=4), import_published(GRAFTED, num_heads=4)
    x, t, y = reference["x"], reference["t"], reference["y"]
    with torch.no_grad():
        assert (base(x, t, y) - reference["forward"]).abs().max() <= 1e-5
        assert (grafted(x, t, y) - reference["grafted/forward"]).abs().max() <= 1e-5
    assert record_of(grafted).plan == GraftPlan([Replace("mha", [1, 3], "hyena_x", init="random")])
    assert source_of(base) == str(BASE.resolve())


@pytest.mark.parametrize("form", ["ema", "model", "bare", "safetensors"])
def test_forms_of_a_published_file(tmp_path: Path, model: nn.Module, form: str) -> None:
    state, other = model.state_dict(), tiny_dit(seed=9).state_dict()
    file = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
    if form == "safetensors":
        weights.write_safetensors(file, state)
    else:
        arguments = argparse.Namespace(model="DiT-S/2")
        forms: dict[str, Any] = {
            "ema": {
                "model": other,
                "ema": state,
                "opt": {"state": {}, "step": 3},
                "args": arguments,
                "train_steps": 5,
            },
            "model": {"model": state, "args": arguments},
            "bare": state,
        }
        torch.save(forms[form], file)
    assert equal_states(load_model(file, num_heads=4), model)


class Payload:
    """Pickles to a call that would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("where", ["bare", "beside", "plain-pickle"])
@pytest.mark.parametrize("read", [load_model, import_published])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, model: nn.Module, where: str, read: Any) -> None:
    mark, file = tmp_path / "executed", tmp_path / "x.pt"
    payload = Payload(mark)
    if where == "plain-pickle":
        file.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload if where == "bare" else {"ema": model.state_dict(), "args": payload}, file)
    with pytest.raises(CheckpointError, match="nothing of it was executed"):
        read(file, num_heads=4)
    assert not mark.exists()
    torch.load(file, weights_only=False) if where != "plain-pickle" else pickle.loads(file.read_bytes())
    assert mark.exists()  # the payload is real


@pytest.mark.parametrize("kind", ["empty", "cut", "garbage", "text", "list", "numbers", "folder", "missing"])
@pytest.mark.parametrize("read", [load_model, import_published])
def test_damaged_files_are_named(tmp_path: Path, kind: str, read: Any) -> None:
    file, whole = tmp_path / "x.pt", BASE.read_bytes()
    contents: dict[str, Any] = {
        "empty": b"", "cut": whole[: len(whole) // 2], "garbage": bytes(range(256)) * 40, "text": b"hello\n",
    }  # fmt: skip
    if kind in contents:
        file.write_bytes(contents[kind])
    elif kind == "list":
        torch.save([1, 2], file)
    elif kind == "numbers":
        torch.save({"ema": {"a": 3}}, file)
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(CheckpointError, match=r"x\.pt") as caught:
        read(file, num_heads=4)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s.pop("blocks.2.attn.proj.bias"), r"blocks\.2\.attn.*proj\.bias"),
        (lambda s: s.update({"extra.weight": torch.zeros(2)}), "extra.weight"),
        (lambda s: s.update({"blocks.1.mlp.fc2.bias": torch.zeros(31)}), "blocks.1.mlp.fc2.bias"),
        (lambda s: s.update({"final_layer.linear.bias": torch.full((8,), float("nan"))}), "not finite"),
        (lambda s: s.pop("pos_embed"), "pos_embed"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.")], "block 1"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.")], "block 0"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 15, 32)}), "square"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.zeros(32, 4)}), "x_embedder.proj.weight"),
        (lambda s: s.update({"final_layer.linear.weight": torch.zeros(9, 32)}), "final layer"),
    ],
)  # fmt: skip
def test_state_dicts_that_are_no_dit_are_named(
    tmp_path: Path, model: nn.Module, change: Any, word: str
) -> None:
    state = model.state_dict()
    change(state)
    torch.save(state, tmp_path / "x.pt")
    for read in (load_model, import_published):
        with pytest.raises(CheckpointError, match=word):
            read(tmp_path / "x.pt", num_heads=4)


def test_the_number_of_heads_is_asked_for_where_no_shape_tells() -> None:
    for read in (load_model, import_published):
        with pytest.raises(CheckpointError, match="num_heads="):
            read(BASE)
        with pytest.raises(GraftError, match="num_heads=5"):
            read(BASE, num_heads=5)
    for heads in (0, -1, 2.0, True, "4"):
        with pytest.raises(GraftError, match="num_heads"):
            load_model(BASE, num_heads=heads)


def test_heads_of_published_widths_are_known(tmp_path: Path) -> None:
    model = tiny_dit(hidden_size=384, num_heads=6, depth=1)
    torch.save(model.state_dict(), tmp_path / "s.pt")
    assert load_model(tmp_path / "s.pt").config == model.config


def test_a_grafted_file_is_no_model_and_points_to_import() -> None:
    with pytest.raises(CheckpointError, match=r"out_proj.*graft import"):
        load_model(GRAFTED, num_heads=4)


@pytest.mark.parametrize(
    ("target", "operator", "config"),
    [
        ("mha", "hyena_se", {"kernel_size": 3}), ("mha", "hyena_x", {}), ("mha", "hyena_y", {"kernel_size": 5}),
        ("mha", "swa", {"window": 2}), ("mha", "mamba2", {"d_state": 8, "expand": 3, "head_dim": 8}),
        ("mlp", "mlp", {"ratio": 3}), ("mlp", "mlp", {"ratio": 6}), ("mlp", "mlp", {"ratio": 1.5}),
        ("mlp", "mlp_hyena_x", {}), ("mlp", "mlp_hyena_x", {"kernel_size": 3}),
    ],
)  # fmt: skip
def test_every_operator_is_read_off_a_published_file(
    tmp_path: Path, model: nn.Module, target: str, operator: str, config: dict[str, Any]
) -> None:
    student = graft(model, GraftPlan([Replace(target, [0, 2], operator, config)]))
    file = tmp_path / "model.pt"
    export_published(student, file)
    window = 2 if operator == "swa" else None
    found = import_published(file, num_heads=4, window=window)
    if window is None:
        with pytest.raises(CheckpointError, match="no 'swa' operator"):
            import_published(file, num_heads=4, window=2)
    assert equal_states(found, student)
    assert torch.equal(prediction(found), prediction(student))
    (entry,) = record_of(found).plan
    assert (entry.target, entry.layers, entry.operator) == (target, (0, 2), operator)
    assert entry.config.to_dict() == config  # what is at its default is not stated
    # and from there into a graft folder that needs no base, and out again
    save_graft(found, tmp_path / "graft")
    again = load_graft(tmp_path / "graft")
    assert equal_states(again, student)
    assert record_of(again).plan == record_of(found).plan
    export_published(again, tmp_path / "again.pt")
    assert equal_states(import_published(tmp_path / "again.pt", num_heads=4, window=window), student)


def test_a_mix_of_operators_is_read_off_a_published_file(tmp_path: Path, model: nn.Module) -> None:
    plan = GraftPlan([
        Replace("mha", [0], "swa"), Replace("mha", [1, 3], "hyena_y", {"kernel_size": 3}),
        Replace("mlp", [1], "mlp", {"ratio": 3}), Replace("mlp", [2], "mlp", {"ratio": 6}),
    ])  # fmt: skip
    student = graft(model, plan)
    export_published(student, tmp_path / "x.pt")
    found = import_published(tmp_path / "x.pt", num_heads=4)
    assert {k: e.operator for k, e in record_of(found).plan.sites.items()} == {
        k: e.operator for k, e in record_of(student).plan.sites.items()
    }
    assert equal_states(found, student)


def test_a_self_graft_imports_with_an_empty_plan(tmp_path: Path, model: nn.Module) -> None:
    student = graft(model, GraftPlan([Replace("mha", "all", "mha", init="random")]))
    export_published(student, tmp_path / "x.pt")
    found = import_published(tmp_path / "x.pt", num_heads=4)
    assert len(record_of(found).plan) == 0
    save_graft(found, tmp_path / "graft")
    assert equal_states(load_graft(tmp_path / "graft"), student)


def test_unknown_operators_in_a_published_file_are_named(tmp_path: Path, model: nn.Module) -> None:
    state = graft(model, HALF).state_dict()
    state["blocks.3.attn.short_filter.wait"] = state.pop("blocks.3.attn.short_filter.weight")
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"blocks\.3\.attn: .*'hyena_x'.*short_filter"):
        import_published(tmp_path / "x.pt", num_heads=4)


# ---- our own folders


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


@pytest.mark.parametrize("source", ["no-such-model", "nowhere/at/all", "", "/", "dit-fashion.pt", "a b"])
def test_sources_that_are_nothing_are_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_model(source)
    assert "expected" in str(caught.value)


def test_the_hub_is_asked_for_ids_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    from grafting.loading import save_diffusers

    save_diffusers(tiny_dit(), tmp_path / "transformer")
    asked = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        if name == "some/missing":
            raise OSError("404 Client Error\nmore lines")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert equal_states(load_model("some/dit"), tiny_dit())
    with pytest.raises(CheckpointError, match=r"'some/missing'.*404"):
        load_model("some/missing")
    assert asked == ["some/dit", "some/missing"]


def test_the_packaged_model_loads() -> None:
    model = load_model("dit-fashion")
    assert (model.config.depth, model.config.hidden_size, model.config.num_heads) == (12, 128, 4)
    assert (model.config.in_channels, model.config.input_size, model.config.num_tokens) == (1, 32, 64)
    assert source_of(model) == "dit-fashion"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert prediction(model).isfinite().all()


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

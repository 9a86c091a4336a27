"""Published files: no code in them is run, damage is named, and each operator is read off its tensors."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, prediction, tiny_dit
from stage_tools import states_equal as equal_states
from torch import Tensor, nn

from grafting import GraftPlan, Replace, graft, load_graft, load_model, save_graft
from grafting.errors import CheckpointError, GraftError
from grafting.formats import weights
from grafting.formats.published import export_published, import_published
from grafting.surgery import record_of, source_of

BASE = FIXTURES / "published_format_base.pt"
GRAFTED = FIXTURES / "published_format_grafted_hyena_x.pt"
HALF = GraftPlan([Replace("mha", [1, 3], "hyena_x")])


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

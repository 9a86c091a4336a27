"""Surgery: match, check, then edit a copy; the model that was given stays bit-identical, also after an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from conftest import prediction, tiny_dit
from pydantic import Field
from torch import Tensor, nn

import grafting
from grafting import GraftPlan, Replace, distill, explain, graft, load_graft, load_model, save_graft
from grafting.data import ImageLabelDataset
from grafting.errors import GraftError, OperatorError, PlanError
from grafting.families import family_of
from grafting.formats.weights import digests
from grafting.operators import registry
from grafting.surgery import edited_sites, record_of

HALF = GraftPlan([Replace("mha", "interleaved-50", "hyena_x")])
EVERY = GraftPlan([
    Replace("mha", [0], "hyena_se", {"kernel_size": 3}), Replace("mha", [1], "hyena_y"),
    Replace("mha", [2], "swa", {"window": 2}), Replace("mha", [3], "mamba2", {"d_state": 8}, init="random"),
    Replace("mlp", [0], "mlp", {"ratio": 3}), Replace("mlp", [1], "mlp_hyena_x"),
    Replace("mlp", [3], "mlp", {"ratio": 6}),
])  # fmt: skip


@pytest.fixture
def registered() -> Iterator[None]:
    """Operators that a test registers are forgotten after it."""
    known = dict(registry._entries)
    yield
    registry._entries.clear()
    registry._entries.update(known)


def test_the_model_given_is_untouched(model: nn.Module) -> None:
    before, modules = digests(model), [id(m) for m in model.modules()]
    wanted = prediction(model)
    student = graft(model, EVERY)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert digests(model) == before
    assert [id(m) for m in model.modules()] == modules
    assert torch.equal(prediction(model), wanted)
    assert record_of(model) is None


def test_only_what_the_plan_names_is_new(model: nn.Module) -> None:
    student = graft(model, HALF)
    assert [b.attn.operator_name for b in student.blocks] == ["mha", "hyena_x", "mha", "hyena_x"]
    base, found = model.state_dict(), student.state_dict()
    for name in set(base) & set(found):
        assert torch.equal(base[name], found[name])
        assert base[name].data_ptr() != found[name].data_ptr()
    assert {n.split(".attn")[0] for n in set(base) ^ set(found)} == {"blocks.1", "blocks.3"}
    assert list(edited_sites(student)) == ["blocks.1.attn", "blocks.3.attn"]
    assert record_of(student).plan == GraftPlan([Replace("mha", [1, 3], "hyena_x")])
    assert prediction(student).isfinite().all()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([Replace("mha", [1], "hyena_z")], ["hyena_z", "hyena_x"]),
        ([Replace("mha", [4], "hyena_x")], ["layer 4"]),
        ([Replace("mha", [1], "hyena_x"), Replace("mha", [3, 1], "swa")], ["layer 1", "entry 1", "entry 2"]),
        ([Replace("mha", [1], "hyena_x", {"kernel_size": 0})], ["kernel_size", "layer 1"]),
        ([Replace("mha", [2], "swa", {"window": -3})], ["window=-3", "layer 2"]),
        ([Replace("mha", [2], "swa", {"windw": 3})], ["windw", "window", "layer 2"]),
        ([Replace("mha", [0], "mlp")], ["mlp", "entry 1", "mha"]),
        ([Replace("mlp", [0], "swa")], ["swa", "mlp"]),
        ([Replace("conv", [0], "mlp")], ["conv", "mha, mlp"]),
        ([Replace("mha", "top-local-50", "hyena_x")], ["graft locality"]),
        ([Replace("mha", [3], "mamba2", {"head_dim": 7})], ["head_dim", "layer 3"]),
        ([Replace("mha", [0], "hyena_x"), Replace("mlp", [3], "mlp", {"ratio": 0})], ["ratio", "layer 3"]),
    ],
    ids=str,
)
def test_errors_name_the_place_and_leave_the_model_alone(
    model: nn.Module, entries: list[Replace], words: list[str]
) -> None:
    before = digests(model)
    for act in (graft, explain):
        with pytest.raises(GraftError) as caught:
            act(model, GraftPlan(entries))
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
    assert digests(model) == before
    assert record_of(model) is None
    assert [b.attn.operator_name for b in model.blocks] == ["mha"] * 4


@pytest.mark.parametrize("plan", [None, [], {"entries": []}, "interleaved-50", Replace("mha", "all", "swa")])
def test_something_that_is_no_plan_is_refused(model: nn.Module, plan: Any) -> None:
    with pytest.raises(PlanError, match="plan"):
        graft(model, plan)


def test_a_plan_may_be_plain_data(model: nn.Module) -> None:
    entry = {"replace": {"target": "mha", "layers": [0], "with": "swa"}}
    plain, typed = graft(model, [entry]), graft(model, GraftPlan([Replace("mha", [0], "swa")]))
    assert record_of(plain) == record_of(typed)
    assert explain(model, [entry]).plan == GraftPlan([entry]) == GraftPlan.from_dict([entry])


def test_a_model_of_no_family_is_refused() -> None:
    with pytest.raises(GraftError, match="no family knows a model of class Linear"):
        graft(nn.Linear(2, 2), HALF)


def test_new_operators_depend_on_seed_and_site_alone(model: nn.Module) -> None:
    random = [Replace("mha", [1, 3], "hyena_x", init="random")]
    torch.manual_seed(123)
    a = graft(model, GraftPlan(random), seed=5)
    state = torch.get_rng_state()
    b = graft(model, GraftPlan([*random, Replace("mlp", "all", "mlp", {"ratio": 2}, init="random")]), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    other = graft(model, GraftPlan(random), seed=6)
    for layer in (1, 3):
        for name, tensor in a.blocks[layer].attn.state_dict().items():
            assert torch.equal(tensor, b.blocks[layer].attn.state_dict()[name])
    weights = [m.blocks[layer].attn.in_proj.weight for m in (a, other) for layer in (1, 3)]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(weights[i], weights[j])


def test_a_donor_start_takes_the_donor_s_weights(model: nn.Module) -> None:
    student = graft(
        model, GraftPlan([Replace("mha", [0], "swa", {"window": 16}), Replace("mha", [1], "mha")])
    )
    assert (prediction(student) - prediction(model)).abs().max() < 1e-5  # a window over all is attention
    assert torch.equal(student.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    wider = graft(model, GraftPlan([Replace("mlp", "all", "mlp", {"ratio": 6})]))
    assert (prediction(wider) - prediction(model)).abs().max() < 1e-5  # added units say nothing
    fresh = graft(model, GraftPlan([Replace("mha", [1], "mha", init="random")]))
    assert not torch.equal(fresh.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_explain_on_meta_counts_what_the_graft_has(model: nn.Module) -> None:
    with torch.device("meta"):
        from grafting.models.dit import DiT

        ghost = DiT(model.config)
    said, student = explain(ghost, EVERY), graft(model, EVERY)
    assert all(p.is_meta for p in ghost.parameters())
    assert said.params == tuple(sum(p.numel() for p in m.parameters()) for m in (model, student))
    assert said.flops_per_image == tuple(family_of(m).flops_per_image(m) for m in (model, student))
    assert [(e.site.layer, e.site.kind, e.entry.operator) for e in said.edits] == [
        (0, "mha", "hyena_se"), (0, "mlp", "mlp"), (1, "mha", "hyena_y"), (1, "mlp", "mlp_hyena_x"),
        (2, "mha", "swa"), (3, "mha", "mamba2"), (3, "mlp", "mlp"),
    ]  # fmt: skip
    for edit in said.edits:
        operator = student.get_submodule(edit.site.path)
        assert edit.after.params == sum(p.numel() for p in operator.parameters())
    assert json.loads(json.dumps(said.to_dict())) == said.to_dict()
    assert said.to_dict() == explain(model, EVERY).to_dict()


def test_explain_and_graft_of_xl_2_allocate_nothing() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    teacher = load_model("arch:DiT-XL/2", device="meta")
    said = explain(teacher, HALF)
    student = graft(teacher, HALF)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # of 2.7 GB of weights
    assert said.params[0] == 675_129_632
    assert said.params[1] == sum(p.numel() for p in student.parameters())
    assert [edit.site.layer for edit in said.edits] == list(range(1, 28, 2))


def test_a_graft_on_a_graft(model: nn.Module, tmp_path: Path) -> None:
    first = graft(model, GraftPlan([Replace("mha", [1], "hyena_x", init="random")]), seed=3)
    second = graft(
        first, GraftPlan([Replace("mlp", [1, 2], "mlp", {"ratio": 3}), Replace("mha", [0], "swa")]), seed=4
    )
    assert record_of(first).plan.sites.keys() == {("mha", 1)}
    assert record_of(second).plan.sites.keys() == {("mha", 1), ("mlp", 1), ("mlp", 2), ("mha", 0)}
    assert torch.equal(first.blocks[1].attn.in_proj.weight, second.blocks[1].attn.in_proj.weight)
    assert record_of(second).base_hash == record_of(first).base_hash
    with pytest.raises(PlanError, match=r"layer 1 .*earlier graft"):
        graft(first, GraftPlan([Replace("mha", [1], "swa")]))
    save_graft(second, tmp_path)
    assert torch.equal(prediction(load_graft(tmp_path, base=model)), prediction(second))


def test_training_mode_dtype_and_frozen_tables_carry_over(model: nn.Module) -> None:
    student = graft(model.to(torch.bfloat16).train(), HALF)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student.blocks[1].attn.training
    assert not student.pos_embed.requires_grad
    assert all(p.requires_grad for p in student.blocks[1].attn.parameters())


def _third_party() -> None:
    @grafting.operators.register("box_mean", targets=("mha",), package="boxes")
    class BoxMean(nn.Module):
        def __init__(self, *, dim: int, size: Annotated[int, Field(ge=1)] = 3) -> None:
            super().__init__()
            self.pool = nn.AvgPool1d(size, stride=1, padding=size // 2, count_include_pad=False)
            self.out = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.pool(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.usefixtures("registered")
def test_a_third_party_operator_through_plan_stage_1_save_and_load(
    model: nn.Module, data: ImageLabelDataset, tmp_path: Path
) -> None:
    _third_party()
    file = tmp_path / "plan.yaml"
    file.write_text("- replace: {target: mha, layers: [1, 3], with: {box_mean: {size: 5}}}\n")
    plan = GraftPlan.load(file)
    said = explain(model, plan)
    assert said.edits[0].after.params == 32 * 33
    student = graft(model, plan)
    result = distill(
        student, model, data, {"steps": 60, "batch_size": 16, "lr": 3e-3, "num_validation": 8, "warmup": 4}
    )
    for path, error in result.final_error.items():
        assert error < 0.8 * result.start_error["random"][path]
    save_graft(student, tmp_path / "graft")
    assert json.loads((tmp_path / "graft/graft.json").read_text())["operators"] == {"box_mean": "boxes"}
    assert torch.equal(prediction(load_graft(tmp_path / "graft", base=model)), prediction(student))

    del registry._entries["box_mean"]
    with pytest.raises(OperatorError, match=r"box_mean.*registered by 'boxes'.*import boxes"):
        load_graft(tmp_path / "graft", base=model)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("fault", ["shape", "raises"])
def test_an_operator_that_breaks_the_contract_is_refused_before_the_edit(
    model: nn.Module, fault: str
) -> None:
    class Wrong(nn.Module):
        def __init__(self, *, dim: int) -> None:
            super().__init__()
            self.out = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x)[:, 1:] if fault == "shape" else self.out(x[..., 1:])

    grafting.operators.register("wrong", package="boxes")(Wrong)
    with pytest.raises(PlanError, match=r"layer 2 .*'wrong'"):
        graft(model, GraftPlan([Replace("mha", [2], "wrong")]))


def test_mlp_hyena_x_is_tied_to_its_number_of_tokens() -> None:
    student = graft(tiny_dit(), GraftPlan([Replace("mlp", [0], "mlp_hyena_x")]))
    with pytest.raises(OperatorError, match="16"):
        student.blocks[0].mlp(torch.zeros(1, 9, 32))


def test_taps_are_what_the_operators_see_and_make(model: nn.Module) -> None:
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10, 700]), torch.tensor([1, 2])
    family, seen = family_of(model), {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, inputs, output, path=path: seen.__setitem__(path, (inputs[0], output))
        )
        for path in ("blocks.1.attn", "blocks.3.mlp")
    ]
    taps = family.taps(model, x, t, y, ["blocks.3.mlp", "blocks.1.attn"])
    for handle in handles:
        handle.remove()
    assert set(taps) == set(seen)
    for path, (given, made) in seen.items():
        assert torch.equal(taps[path].input, given)
        assert torch.equal(taps[path].output, made)
        assert not taps[path].output.requires_grad
    with torch.no_grad():
        c = model.conditioning(t, y)
        gates = model.blocks[3].adaLN_modulation(c).chunk(6, dim=1)
        output, features = family.predict_with_features(model, x, t, y, (0, 3))
    assert torch.equal(taps["blocks.3.mlp"].gate, gates[5].unsqueeze(1))
    gate_1 = model.blocks[1].adaLN_modulation(c).chunk(6, dim=1)[2]
    assert torch.equal(taps["blocks.1.attn"].gate, gate_1.unsqueeze(1))
    assert set(features) == {0, 3}
    assert torch.equal(output, model(x, t, y))

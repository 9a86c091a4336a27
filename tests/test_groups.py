"""Blocks side by side and blocks dropped: the edit, its numbers, its execution, its way to disk and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prediction, tiny_dit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grafting import GraftPlan, Parallelize, Replace, explain, graft, load_graft, load_model, save_graft
from grafting.analysis.costs import plan_cost
from grafting.entries import Prune
from grafting.errors import CheckpointError, GraftError, PlanError
from grafting.families import family_of
from grafting.formats.published import export_published, load_published
from grafting.formats.weights import digests, read_safetensors
from grafting.inspection import inspect_model
from grafting.models.groups import BlockGroup
from grafting.models.stacked import StackedLinear, Unlike, stack, take
from grafting.surgery import edited_groups, edited_sites, record_of
from grafting.training.config import FinetuneConfig
from grafting.training.optimizers import make_optimizer

PAIRS = GraftPlan([Parallelize("pairs")])


def in_sequence(student: nn.Module) -> nn.Module:
    """A copy whose groups run branch after branch: the reference."""
    other = copy.deepcopy(student)
    for path in edited_groups(student):
        group = other.get_submodule(path)
        assert isinstance(group, BlockGroup)
        group.apart = "the test says so"
        group.unstack()
    return other


def tokens(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 16, 32, generator=generator), torch.randn(batch, 32, generator=generator)


# ---- the edit


@pytest.mark.parametrize(("merge", "groups"), [("concat", "pairs"), ("residual", [[0, 1, 2]])])
def test_a_group_is_the_formula_of_its_blocks(model: nn.Module, merge: str, groups: Any) -> None:
    student = graft(model, GraftPlan([Parallelize(groups, merge)]))
    group, (x, c) = student.blocks[0], tokens()
    count = len(group.layers)
    torch.manual_seed(0)
    nn.init.normal_(group.merge.weight, std=0.1)
    nn.init.normal_(group.merge.bias)
    outputs = [model.blocks[layer](x, c) for layer in group.layers]
    if merge == "concat":
        wanted = torch.cat(outputs, dim=2) @ group.merge.weight.T + group.merge.bias
    else:
        updates = torch.cat([y - x for y in outputs], dim=2)
        wanted = x + updates @ group.merge.weight.T + group.merge.bias
    assert group.is_stacked
    assert len(student.blocks) == 4 - sum(
        len(g) - 1 for g in ([[0, 1], [2, 3]] if count == 2 else [[0, 1, 2]])
    )
    torch.testing.assert_close(group(x, c), wanted)


@pytest.mark.parametrize("merge", ["concat", "residual"])
def test_without_data_the_merge_is_naive(model: nn.Module, merge: str) -> None:
    student, (x, c) = graft(model, GraftPlan([Parallelize([[1, 2]], merge)])), tokens()
    first, second = (model.blocks[layer](x, c) for layer in (1, 2))
    wanted = (first + second) / 2 if merge == "concat" else first + second - x
    torch.testing.assert_close(student.blocks[1](x, c), wanted)
    random = graft(model, GraftPlan([Parallelize([[1, 2]], merge, init="random")]), seed=3)
    again = graft(model, GraftPlan([Parallelize([[1, 2]], merge, init="random")]), seed=3)
    other = graft(model, GraftPlan([Parallelize([[1, 2]], merge, init="random")]), seed=4)
    weights = [m.blocks[1].merge.weight for m in (random, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], student.blocks[1].merge.weight)


def test_pruned_blocks_are_gone_and_the_others_stay(model: nn.Module) -> None:
    before = digests(model)
    student = graft(model, GraftPlan([Prune([0, 2])]))
    assert [len(m.blocks) for m in (model, student)] == [4, 2]
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    h, c = model.x_embedder(x) + model.pos_embed, model.conditioning(t, y)
    for layer in (1, 3):
        h = model.blocks[layer](h, c)
    torch.testing.assert_close(student(x, t, y), model.unpatchify(model.final_layer(h, c)))
    assert digests(model) == before
    assert family_of(student).layout(student) == ((1,), (3,))
    assert [site.layer for site in family_of(student).sites(student)] == [1, 1, 3, 3]


def test_operators_groups_and_pruning_in_one_plan(model: nn.Module) -> None:
    plan = GraftPlan([
        Replace("mha", [1, 2], "hyena_x"), Parallelize([[1, 2]]), Prune([3]), Replace("mlp", [0], "mlp", {"ratio": 2}),
    ])  # fmt: skip
    student = graft(model, plan)
    group = student.blocks[1]
    assert family_of(student).layout(student) == ((0,), (1, 2))
    assert group.is_stacked
    assert [group.branch(j).attn.operator_name for j in (0, 1)] == ["hyena_x", "hyena_x"]
    alone = graft(model, GraftPlan([Replace("mha", [1, 2], "hyena_x")]))
    x, c = tokens()
    torch.testing.assert_close(group(x, c), (alone.blocks[1](x, c) + alone.blocks[2](x, c)) / 2)
    assert list(edited_sites(student)) == [
        "blocks.0.mlp",
        "blocks.1.branches.0.attn",
        "blocks.1.branches.1.attn",
    ]
    assert list(edited_groups(student)) == ["blocks.1"]
    assert edited_groups(student)["blocks.1"][0].layers == (1, 2)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([Parallelize([[0, 1], [1, 2]])], ["layer 1: in two groups", "entry 1"]),
        ([Parallelize([[0, 2]])], ["[0, 2]", "not consecutive", "layer 1 lies between"]),
        ([Parallelize([[3, 4]])], ["[3, 4]", "4", "0 to 3"]),
        ([Parallelize({"size": 3})], ["4 layers can't be split into groups of 3"]),
        ([Prune([7])], ["7", "0 to 3"]),
        ([Prune("all")], ["no block of 4 is left"]),
        ([Parallelize("pairs"), Prune([1])], ["layer 1: pruned by entry 2", "parallelized by entry 1"]),
        ([Replace("mha", [1], "swa"), Prune([1])], ["layer 1: pruned by entry 2", "replaced (mha) by entry 1"]),
    ],
    ids=str,
)  # fmt: skip
def test_groups_that_can_t_be_are_named(model: nn.Module, entries: list[Any], words: list[str]) -> None:
    before = digests(model)
    for act in (graft, explain):
        with pytest.raises(PlanError) as caught:
            act(model, GraftPlan(entries))
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert digests(model) == before


def test_a_graft_on_a_graft(model: nn.Module, tmp_path: Path) -> None:
    first = graft(model, GraftPlan([Parallelize([[0, 1]]), Replace("mha", [2], "swa")]))
    before = digests(first)
    second = graft(first, GraftPlan([Replace("mha", [0, 1], "hyena_x"), Parallelize([[2, 3]], "residual")]))
    assert digests(first) == before
    assert family_of(second).layout(second) == ((0, 1), (2, 3))
    assert [g.is_stacked for g in second.blocks] == [True, False]
    assert second.blocks[0].branch(1).attn.operator_name == "hyena_x"
    save_graft(second, tmp_path)
    assert torch.equal(prediction(load_graft(tmp_path, base=model)), prediction(second))
    pruned = graft(model, GraftPlan([Prune([2])]))
    for student, entry, words in (
        (first, Parallelize([[1, 2]]), "layer 1: in two groups"), (first, Prune([0]), "layer 0: pruned"),
        (first, Prune([2]), "layer 2: pruned"), (pruned, Replace("mha", [2], "swa"), "layer 2 was pruned"),
        (pruned, Parallelize([[2, 3]]), "layer 2: pruned"), (pruned, Prune([2]), "layer 2: pruned"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=rf"{words}.*earlier graft.*edit the base with one plan instead"):
            graft(student, GraftPlan([entry]))


# ---- what runs as one


@pytest.mark.parametrize("operator", ["mha", "swa", "hyena_se", "hyena_x", "hyena_y", "wide filter"])
@pytest.mark.parametrize("merge", ["concat", "residual"])
def test_branches_as_one_equal_branches_in_sequence(model: nn.Module, operator: str, merge: str) -> None:
    name, config = ("hyena_se", {"kernel_size": 18}) if operator == "wide filter" else (operator, {})
    plan = [
        Parallelize([[0, 1, 2]], merge),
        *([] if name == "mha" else [Replace("mha", "all", name, config)]),
    ]
    student = graft(model, GraftPlan(plan))
    reference = in_sequence(student)
    assert student.blocks[0].is_stacked
    assert not reference.blocks[0].is_stacked
    for a, b in zip(student.state_dict().items(), reference.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    gradients = []
    for group in (student.blocks[0], reference.blocks[0]):
        x, c = (t.requires_grad_() for t in tokens())
        y = group(x, c)
        y.square().sum().backward()
        gradients.append([y.detach(), x.grad, c.grad, *_gradients(group)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def _gradients(group: BlockGroup) -> list[Tensor]:
    """Gradients in the plain layout, branch after branch."""
    found = [p.grad for p in group.merge.parameters()]
    if not group.is_stacked:
        return found + [p.grad for branch in group.branches for p in branch.parameters()]
    return found + [p.grad[j] for j in range(group.num_branches) for p in group.branches.parameters()]


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([Replace("mha", [1], "hyena_x")], "attn: mha against hyena_x"),
        ([Replace("mha", "all", "mamba2", {"d_state": 8})], "attn: mamba2 has no batched form"),
        ([Replace("mlp", "all", "mlp_hyena_x")], "mlp: mlp_hyena_x has no batched form"),
        ([Replace("mha", [0], "swa", {"window": 2}), Replace("mha", [1], "swa", {"window": 3})], "swa of unlike"),
        ([Replace("mlp", [1], "mlp", {"ratio": 3})], "mlp.fc1: Linear of unlike configuration"),
        ([Replace("mha", [0, 1], "swa", train=False)], "an operator in it keeps its weights"),
    ],
)  # fmt: skip
def test_unlike_branches_run_in_sequence_and_explain_says_so(
    model: nn.Module, entries: Any, why: str
) -> None:
    plan = GraftPlan([*entries, Parallelize([[0, 1]])])
    said = explain(model, plan)
    assert why in str(said.groups[0].in_sequence)
    row = next(edit for edit in said.to_dict()["edits"] if edit["target"] == "block_group")
    assert row["runs"].startswith("in sequence, ")
    assert "run in sequence" in row["to"]
    student = graft(model, plan)
    assert not student.blocks[0].is_stacked
    assert prediction(student).isfinite().all()
    assert explain(model, PAIRS).groups[0].to_dict()["runs"] == "as one"


def test_frozen_weights_are_not_mixed_with_others() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(Unlike, match="some are frozen"):
        stack([first, second])
    both = stack([second, second])
    assert isinstance(both, StackedLinear)
    assert not both.weight.requires_grad
    shared = take(both, 1, share=True)
    assert shared.weight.data_ptr() == both.weight[1].data_ptr()
    assert take(both, 1, share=False).weight.data_ptr() != both.weight[1].data_ptr()


def test_compiled_checkpointed_and_in_bf16(model: nn.Module) -> None:
    student = graft(model, GraftPlan([Parallelize([[0, 1]]), Parallelize([[2, 3]], "residual")]))
    compiled = torch.compile(student.blocks[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tokens()), student.blocks[0](*tokens()), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        prediction(graft(model.bfloat16(), PAIRS).float()), prediction(graft(model, PAIRS).float())
    )
    for group in student.blocks:
        gradients = []
        for run in (group, lambda x, c, group=group: checkpoint(group, x, c, use_reentrant=False)):
            group.zero_grad()
            x, c = tokens()
            run(x, c).square().mean().backward()
            gradients.append([p.grad.clone() for p in group.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("merge", ["concat", "residual"])
def test_autocast_does_not_round_the_residual_stream(model: nn.Module, merge: str) -> None:
    student = graft(model, GraftPlan([Parallelize("pairs", merge)]))
    group, (x, c) = student.blocks[0], tokens()
    x = 100 + x  # in bf16 the neighbours of 100 are half a unit away
    wanted = group(x, c)
    with torch.autocast("cpu", torch.bfloat16):
        found, reference = group(x, c), in_sequence(student).blocks[0](x, c)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.02
    assert (found - reference).abs().mean() < 0.02


def test_muon_treats_a_stacked_layer_as_the_layers_it_holds() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 4) for _ in range(3)]
    stacked, plain = nn.Sequential(stack(layers)), nn.Sequential(*layers)
    config = FinetuneConfig(optimizer="muon", lr=1e-2)
    optimizers = [make_optimizer(m, [list(m.parameters())], config) for m in (stacked, plain)]
    for step in range(3):
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(step))
        stacked(x.flatten(0, 1)).square().sum().backward()
        for layer, rows in zip(plain, x, strict=True):
            layer(rows).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:  # a resumed run goes on with the same state
            state = optimizers[0].state_dict()
            optimizers[0] = make_optimizer(stacked, [list(stacked.parameters())], config)
            optimizers[0].load_state_dict(state)
    for j, layer in enumerate(plain):
        torch.testing.assert_close(stacked[0].weight[j], layer.weight)
        torch.testing.assert_close(stacked[0].bias[j], layer.bias)


# ---- numbers


def test_explain_counts_what_the_graft_has(model: nn.Module) -> None:
    plan = GraftPlan([
        Replace("mha", [0, 1], "hyena_x"), Parallelize([[0, 1]]), Replace("mha", [2], "swa"), Prune([3]),
    ])  # fmt: skip
    with torch.device("meta"):
        ghost = type(model)(model.config)
    said, student = explain(ghost, plan), graft(model, plan)
    assert said.params == tuple(sum(p.numel() for p in m.parameters()) for m in (model, student))
    assert said.flops_per_image == tuple(family_of(m).flops_per_image(m) for m in (model, student))
    assert said.depth == (4, 2)
    assert json.loads(json.dumps(said.to_dict())) == explain(model, plan).to_dict()
    for key, (before, after) in (("params", said.params), ("flops", said.flops_per_image)):
        assert after - before == sum(edit[key][1] - edit[key][0] for edit in said.to_dict()["edits"])
    counted = plan_cost(model, plan)
    assert counted["model"]["depth"] == [4, 2]
    targets = {row["target"]: row for row in counted["rows"] if row["target"] != "mha"}
    assert targets["block"]["params_pct"] == -25.0
    assert targets["block_group"]["layers"] == [0, 1]
    found = inspect_model(student)
    assert (found["depth"], found["num_layers"], found["params"]) == (2, 4, said.params[1])
    assert found["groups"] == [{"path": "blocks.0", "layers": [0, 1], "merge": "concat", "runs": "as one"}]
    assert [site["operator"] for site in found["sites"]] == ["hyena_x", "mlp", "hyena_x", "mlp", "swa", "mlp"]


def test_xl_2_at_depth_14_has_712_million_parameters() -> None:
    teacher = load_model("arch:DiT-XL/2", device="meta")
    said = explain(teacher, PAIRS)
    merges = 14 * (2 * 1152 * 1152 + 1152)
    assert said.depth == (28, 14)
    assert said.params == (675_129_632, 712_304_672)
    assert said.params[1] - said.params[0] == merges
    assert said.flops_per_image[1] - said.flops_per_image[0] == 14 * 2 * 256 * 2 * 1152 * 1152
    assert sum(p.numel() for p in graft(teacher, PAIRS).parameters()) == 712_304_672
    row = plan_cost(teacher, PAIRS)["rows"][0]
    assert (row["target"], len(row["layers"])) == ("block_group", 28)


# ---- to disk and back


@pytest.mark.parametrize("merge", ["concat", "residual"])
def test_save_and_load(model: nn.Module, tmp_path: Path, merge: str) -> None:
    plan = GraftPlan([Parallelize([[0, 1]], merge), Prune([3]), Replace("mha", [0], "hyena_x")])
    student = graft(model, plan)
    save_graft(student, tmp_path)
    stored = read_safetensors(next(tmp_path.glob("*.safetensors")))
    assert {name.split(".")[2] for name in stored} == {"merge", "branches"}
    assert {".".join(name.split(".")[:6]) for name in stored if "branches" in name} == {
        f"blocks.0.branches.0.attn.{part}" for part in ("in_proj", "short_filter", "out_proj")
    }
    loaded = load_graft(tmp_path, base=model)
    assert digests(loaded) == digests(student)
    assert torch.equal(prediction(loaded), prediction(student))
    assert record_of(loaded).plan == plan.resolve(4)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    save_graft(student, tmp_path)
    assert json.loads((tmp_path / "graft.json").read_text())["base"] is None
    assert digests(load_graft(tmp_path)) == digests(student)


def test_a_plain_layout_that_does_not_fit_is_refused(model: nn.Module) -> None:
    student = graft(model, PAIRS)
    state = student.state_dict()
    assert {"blocks.0.branches.1.attn.qkv.weight", "blocks.1.merge.bias"} <= set(state)
    assert torch.equal(state["blocks.1.branches.0.mlp.fc1.weight"], model.blocks[2].mlp.fc1.weight)
    graft(model, PAIRS).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.branches\.attn\.qkv\.weight"):
        graft(model, PAIRS).load_state_dict({k: v for k, v in state.items() if "0.branches.1.attn" not in k})
    name = "blocks.0.branches.1.attn.qkv.weight"
    with pytest.raises(RuntimeError, match=r"branches\.1\.attn\.qkv\.weight has shape"):
        graft(model, PAIRS).load_state_dict({**state, name: state[name][:5]})


def test_another_base_and_a_damaged_file_are_refused(model: nn.Module, tmp_path: Path) -> None:
    save_graft(graft(model, PAIRS), tmp_path)
    with pytest.raises(CheckpointError, match="another base"):
        load_graft(tmp_path, base=tiny_dit(seed=9))
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        load_graft(tmp_path, base=model)


def test_the_published_layout_has_no_groups_but_may_be_shallow(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="side by side"):
        export_published(graft(model, PAIRS), tmp_path / "a.pt")
    pruned = graft(model, GraftPlan([Prune([1])]))
    export_published(pruned, tmp_path / "b.pt")
    read = load_published(tmp_path / "b.pt", num_heads=4)
    assert read.config.depth == 3
    assert torch.equal(prediction(read), prediction(pruned))

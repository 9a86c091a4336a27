"""What makes the stages faster changes their results by nothing, or by rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from torch import Tensor, nn

from grafting import GraftPlan, Replace, distill, draws, finetune, graft, load_model
from grafting.data import ImageLabelDataset
from grafting.diffusion.process import tables
from grafting.errors import Interrupted, RunError
from grafting.families import family_of
from grafting.generation import generate
from grafting.runs import RunFolder
from grafting.training import acceleration, distillation, finetuning
from grafting.training.acceleration import compiled, compiles, frozen_copy
from grafting.training.compute import Compute
from grafting.training.loop import Batches, step_index

# The tracer looks at .grad of inputs under a filter of its own, which warnings as errors go past.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
CPU = torch.device("cpu")
BF16 = Compute(CPU, "bf16")
PLAN = GraftPlan([Replace("mha", [1], "hyena_x", init="random")])
SMALL = {"depth": 2, "hidden_size": 16, "num_heads": 2}
COMMON: dict[str, Any] = {
    "batch_size": 8, "num_validation": 4, "steps": 8, "warmup": 2, "validate_every": 4, "checkpoint_every": 4,
    "log_every": 2, "lr": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_dit(**SMALL)


@pytest.fixture(scope="module")
def data() -> ImageLabelDataset:
    generator = torch.Generator().manual_seed(0)
    return ImageLabelDataset(torch.randn(48, 1, 8, 8, generator=generator), torch.arange(48) % 4, name="tiny")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- compiled blocks


def eager(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
    return graph.forward


@pytest.fixture
def compiles_quickly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stages and sampling compile by a backend that runs the traced graphs as they are; how many those were."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    for module in (distillation, finetuning):
        monkeypatch.setattr(module, "compiled", functools.partial(compiled, backend=backend))
    monkeypatch.setattr("grafting.generation.compiled", functools.partial(compiled, backend=backend))
    torch.compiler.reset()
    return graphs


def test_auto_compiles_on_cuda_only() -> None:
    assert not compiles("auto", CPU)
    assert compiles("auto", torch.device("cuda"))
    assert compiles(True, CPU)
    assert not compiles(False, torch.device("cuda"))


def test_modules_are_as_before_after_being_compiled(teacher: nn.Module) -> None:
    torch.compiler.reset()
    block, x, c = family_of(teacher).compilable(teacher)[0], torch.randn(2, 16, 16), torch.randn(2, 16)
    names, right = list(block.state_dict()), block(x, c)
    taps: dict[str, Any] = {}
    with compiled([block], True, CPU, backend=eager):
        assert block._compiled_call_impl is not None
        torch.testing.assert_close(block(x, c), right)
        block(x, c, taps)
        assert list(block.state_dict()) == names
    assert block._compiled_call_impl is None
    assert set(taps) == {"attn", "mlp"}
    with compiled([block], "auto", CPU):
        assert block._compiled_call_impl is None


def test_compiled_stages_learn_the_same(
    teacher: nn.Module, data: ImageLabelDataset, compiles_quickly: list[int]
) -> None:
    ends = []
    for compile in (False, True):
        student = graft(teacher, PLAN)
        one = {**COMMON, "precision": "fp32", "compile": compile}
        distill(student, teacher, data, one)
        assert bool(compiles_quickly) == compile
        two = {**one, "objectives": {"output": 1.0}}
        finetune(student, data, two, teacher)
        assert all(module._compiled_call_impl is None for module in student.modules())
        ends.append(weights(student))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)


class Stopping(RunFolder):
    at, calls = 10**9, 0

    def stop_requested(self) -> int | None:
        self.calls += 1
        return 143 if self.calls > self.at else None


def resumed_equals_whole(
    work: Callable[[nn.Module, RunFolder], Any], student: Callable[[], nn.Module], path: Path
) -> None:
    whole, cut = RunFolder(path / "whole"), Stopping(path / "cut")
    for folder in (whole, cut):
        folder.path.mkdir()
    first, second = student(), student()
    work(first, whole)
    cut.at = 5
    with pytest.raises(Interrupted):
        work(second, cut)
    torch.compiler.reset()
    third = student()
    work(third, RunFolder(cut.path))
    assert torch.equal(weights(first), weights(third))


def test_a_compiled_stage_goes_on_to_the_same_bits(
    teacher: nn.Module, data: ImageLabelDataset, compiles_quickly: list[int], tmp_path: Path
) -> None:
    config = {**COMMON, "precision": "bf16", "compile": True, "objectives": {"output": 1.0}}
    resumed_equals_whole(
        lambda student, run: finetune(student, data, config, teacher, journal=run),
        lambda: graft(teacher, PLAN), tmp_path,
    )  # fmt: skip
    assert compiles_quickly


def test_compiled_sampling_draws_the_same(
    teacher: nn.Module, compiles_quickly: list[int], tmp_path: Path
) -> None:
    import numpy as np

    drawn = [
        np.load(generate(teacher, tmp_path / f"{compile}.npz", num=3, steps=2, compile=compile))["arr_0"]
        for compile in (False, True)
    ]
    assert compiles_quickly
    assert np.abs(drawn[0].astype(int) - drawn[1].astype(int)).max() <= 1


# ---- what autocast must not round


def test_the_image_at_high_noise_survives_autocast() -> None:
    model = load_model("dit-fashion").eval()
    family, index = family_of(model), torch.arange(40)
    x = draws.normal(3, "test", index, family.sample_shape(model))  # at t = 999 a sample is noise
    t, table = torch.full((40,), 999), tables(x.device)

    def image() -> Tensor:
        output = family.predict(model, x, t, index % 10)
        assert output.dtype == torch.float32
        noise = table.sqrt_one_minus_alpha_bar[999] * output[:, : x.shape[1]]
        return (x - noise) / table.sqrt_alpha_bar[999]

    with torch.no_grad():
        right = image()
        with BF16.autocast():
            share = (image() - right).square().sum() / (right - right.mean(0)).square().sum()
    assert 0 < share < 0.03  # 0.19 when the first and last layer are rounded


def test_the_ends_of_others_models_are_not_rounded_either() -> None:
    from pixart_tools import captions, latents, tiny_transformer

    model = tiny_transformer()
    family, x, t, cond = family_of(model), latents(2), torch.tensor([3, 700]), captions(2)
    seen: list[torch.dtype] = []
    for end in family.ends(model):
        end.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.no_grad(), BF16.autocast():
        output = family.predict(model, x, t, cond)
        again, _ = family.predict_with_features(model, x, t, cond, ())
    assert output.dtype == torch.float32
    assert seen == [torch.float32] * 4
    assert torch.equal(output, again)
    assert not any("forward" in vars(end) for end in family.ends(model))  # the model is left as it was
    hooked = {end: functools.partial(type(end).forward, end) for end in family.ends(model)}
    for end, forward in hooked.items():
        end.forward = forward  # as accelerate's offload does
    with torch.no_grad(), BF16.autocast():
        assert torch.equal(family.predict(model, x, t, cond), output)
    assert all(vars(end)["forward"] is forward for end, forward in hooked.items())
    half = tiny_transformer().to(torch.bfloat16)  # weights in bf16 are the user's choice
    with torch.no_grad(), BF16.autocast():
        assert family.predict(half, x, t, cond).dtype == torch.bfloat16


# ---- frozen weights in bf16


def test_a_frozen_copy_computes_the_same_bits_under_autocast(teacher: nn.Module) -> None:
    before = weights(teacher).clone()
    copy = frozen_copy(teacher, BF16)
    family = family_of(teacher)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 1, 4])
    with torch.no_grad(), BF16.autocast():
        assert torch.equal(family.predict(copy, x, t, y), family.predict(teacher, x, t, y))
        mine, right = (family.taps(model, x, t, y, ["blocks.1.attn"]) for model in (copy, teacher))
    for a, b in zip(mine["blocks.1.attn"][:3], right["blocks.1.attn"][:3], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(weights(teacher), before)
    linear = {name: m.weight for name, m in copy.named_modules() if isinstance(m, nn.Linear)}
    ends = {name for name in linear if name.startswith("final_layer.")}
    assert {name for name, weight in linear.items() if weight.dtype == torch.float32} == ends
    assert all(weight.dtype == torch.bfloat16 for name, weight in linear.items() if name not in ends)
    assert not any(weight.requires_grad for name, weight in linear.items() if name not in ends)
    assert copy.pos_embed is teacher.pos_embed
    assert frozen_copy(teacher, replace(BF16, precision="fp32")) is teacher


def test_a_frozen_copy_of_a_text_to_image_model_too() -> None:
    from pixart_tools import captions, latents, tiny_transformer

    model = tiny_transformer()
    family, copy = family_of(model), frozen_copy(model, BF16)
    x, t, cond = latents(2), torch.tensor([3, 700]), captions(2)
    with torch.no_grad(), BF16.autocast():
        assert torch.equal(family.predict(copy, x, t, cond), family.predict(model, x, t, cond))
        path = family.sites(model)[2].path
        mine, right = (family.taps(m, x, t, cond, [path])[path] for m in (copy, model))
    assert torch.equal(mine.output, right.output)
    assert family.compilable(model, tapped=True) == []
    assert len(family.compilable(model)) == 4


def test_stages_in_bf16_end_at_the_same_bits_with_a_frozen_copy(
    teacher: nn.Module, data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for copying in (True, False):
        if not copying:
            for module in (distillation, finetuning):
                monkeypatch.setattr(module, "frozen_copy", lambda model, compute: model)
        student = graft(teacher, PLAN)
        distill(student, teacher, data, {**COMMON, "precision": "bf16"})
        objectives = {"output": 1.0, "features": 0.1}
        finetune(student, data, {**COMMON, "precision": "bf16", "objectives": objectives}, teacher)
        ends.append(weights(student))
    assert torch.equal(*ends)


# ---- a teacher pass for several updates


def noting_passes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The sample numbers of all training batches that the teacher sees."""
    seen: list[Tensor] = []
    original = Batches.at

    def at(self: Batches, index: Tensor) -> Any:
        if self.purpose == "distill":
            seen.append(index)
        return original(self, index)

    monkeypatch.setattr(Batches, "at", at)
    return seen


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_reuse_makes_one_teacher_pass_for_several_updates(
    micro_batch: int, teacher: nn.Module, data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noting_passes(monkeypatch)
    settings = {**COMMON, "steps": 12, "reuse": 3, "reuse_passes": 2, "micro_batch": micro_batch}
    student = graft(teacher, PLAN)
    result = distill(student, teacher, data, {**settings, "precision": "fp32"})
    assert torch.equal(torch.cat(seen), torch.cat([step_index(step, 8) for step in range(4)]))
    assert all(v < result.start_error["random"][k] for k, v in result.final_error.items())
    plain = distill(graft(teacher, PLAN), teacher, data, {**settings, "precision": "fp32", "reuse": 1})
    passes = family_of(teacher).flops_per_image(teacher) * 12 * 8
    assert plain.flops - result.flops == pytest.approx(passes * 2 / 3)


def test_an_update_draws_from_all_passes_in_the_buffer_which_is_bounded() -> None:
    from grafting.families import Tap
    from grafting.training.reuse import ReusedTaps

    def taps_at(index: Tensor, paths: list[str]) -> dict[str, Tap]:
        values = index.float()[:, None, None].expand(-1, 2, 3)
        return {path: Tap(values, values + 0.5, None) for path in paths}

    made = ReusedTaps(taps_at, ["a"], seed=0, batch_size=8, micro_batch=0, reuse=4, passes=3)
    uses = torch.zeros(8 * 12)
    for step in range(48):
        tap = made.at(step, torch.arange(8), ["a"])["a"]
        assert torch.equal(tap.output, tap.input + 0.5)
        numbers = tap.input[:, 0, 0].long()
        assert len(numbers.unique()) == 8  # none twice in one update
        newest = step // 4
        assert numbers.min() >= 8 * max(0, newest - 2)
        assert numbers.max() < 8 * (newest + 1)
        uses[numbers] += 1
    assert uses[16:72].mean() == pytest.approx(4, abs=0.5)  # `reuse` times each, on average
    assert made._held["a"][0].shape == (24, 2, 3)  # type: ignore[union-attr]
    again = ReusedTaps(taps_at, ["a"], seed=0, batch_size=8, micro_batch=3, reuse=4, passes=3)
    part = again.at(47, torch.tensor([6, 1]), ["a"])["a"]
    assert torch.equal(part.input, tap.input[[6, 1]])


def test_reuse_goes_on_to_the_same_bits(teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path) -> None:
    config = {**COMMON, "precision": "bf16", "reuse": 2, "reuse_passes": 3}
    resumed_equals_whole(
        lambda student, run: distill(student, teacher, data, config, journal=run),
        lambda: graft(teacher, PLAN), tmp_path,
    )  # fmt: skip


def test_reuse_is_refused_where_it_can_not_be_exact(
    teacher: nn.Module, data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="mode cached stores all teacher passes already"):
        distill(graft(teacher, PLAN), teacher, data, {**COMMON, "reuse": 2, "mode": "cached"})
    monkeypatch.setattr(distillation, "make_compute", lambda device, precision: Compute(CPU, "fp32", 0, 2))
    with pytest.raises(RunError, match="reuse=2 works in one process"):
        distill(graft(teacher, PLAN), teacher, data, {**COMMON, "reuse": 2})


def test_the_limit_of_graphs_is_given_back() -> None:
    import torch._dynamo.config as dynamo

    before = dynamo.recompile_limit
    with compiled([nn.Linear(2, 2)], True, CPU, backend=eager):
        assert dynamo.recompile_limit == acceleration.GRAPHS
    assert dynamo.recompile_limit == before

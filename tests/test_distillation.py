"""Stage 1 on a tiny DiT: what is learned, in closed form, and what is kept."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import prediction, tiny_dit
from stage_tools import RANDOM, STAGE_1, batches, states_equal
from torch import Tensor, nn

from grafting import GraftPlan, Replace, diffusion, distill, finetune, graft, operators
from grafting.data import ImageLabelDataset
from grafting.errors import RunError
from grafting.families import Tap, family_of
from grafting.surgery import edited_sites
from grafting.training import starts
from grafting.training.cache import ActivationCache
from grafting.training.config import DistillConfig, settings
from grafting.training.initialization import fit_readout
from grafting.training.loop import Quiet, split, step_index
from grafting.training.pupils import pupils_of


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_dit()


@pytest.mark.parametrize(
    "plan",
    [
        RANDOM,
        GraftPlan([Replace("mha", [0], "swa"), Replace("mha", [2], "mamba2", {"d_state": 8, "head_dim": 8}),
                   Replace("mlp", [1], "mlp", {"ratio": 2}), Replace("mlp", [2], "mlp_hyena_x")]),
    ],
    ids=["random", "donor"],
)  # fmt: skip
def test_stage_1_lowers_the_error_of_every_operator(
    teacher: nn.Module, data: ImageLabelDataset, plan: GraftPlan
) -> None:
    student, before = graft(teacher, plan), copy.deepcopy(teacher.state_dict())
    untouched = {n: t.clone() for n, t in student.state_dict().items() if n in before}
    result = distill(student, teacher, data, {**STAGE_1, "steps": 80})
    for path, error in result.final_error.items():
        assert error < 0.7 * result.start_error["random"][path], path
        if "fitted" in result.start_error:
            assert error <= result.start_error["fitted"][path] * 1.0001
    assert all(torch.equal(tensor, before[n]) for n, tensor in teacher.state_dict().items())
    edited = tuple(result.final_error)
    assert all(
        torch.equal(student.state_dict()[n], t) for n, t in untouched.items() if not n.startswith(edited)
    )
    assert result.image_visits == 80 * 16
    assert (prediction(student) - prediction(teacher)).norm() < (
        prediction(graft(teacher, plan)) - prediction(teacher)
    ).norm()


@pytest.mark.parametrize("operator", ["hyena_x", "swa", "mamba2", "hyena_se"])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_the_fitted_readout_is_the_ridge_solution(operator: str, ridge: float) -> None:
    """min sum |W z + b - y|^2 + lambda |W - W0|^2, by an augmented least-squares problem in float64."""
    torch.manual_seed(0)
    config = {"d_state": 8, "head_dim": 8} if operator == "mamba2" else {}
    module = operators.build(operator, dim=16, num_heads=2, num_tokens=9, **config)
    taps = [Tap(torch.randn(5, 9, 16), torch.randn(5, 9, 16), None) for _ in range(3)]
    readout = module.readout
    start = readout.weight.detach().double().numpy().copy()
    with torch.no_grad():
        z = (
            torch.cat([module.mix(tap.input).reshape(-1, readout.in_features) for tap in taps])
            .double()
            .numpy()
        )
    y = torch.cat([tap.output.reshape(-1, 16) for tap in taps]).double().numpy()
    penalty = math.sqrt(ridge * np.mean(np.sum(z**2, axis=0))) * np.eye(z.shape[1])
    ones, zeros = (np.ones((len(z), 1)), np.zeros((len(penalty), 1)))
    if readout.bias is None:
        ones, zeros = ones[:, :0], zeros[:, :0]
    left = np.block([[z, ones], [penalty, zeros]])
    wanted = np.linalg.lstsq(left, np.concatenate([y, penalty @ start.T]), rcond=None)[0]
    assert fit_readout(module, taps, ridge, torch.device("cpu"))
    np.testing.assert_allclose(readout.weight.detach().numpy(), wanted[: z.shape[1]].T, atol=2e-4, rtol=1e-3)
    if readout.bias is not None:
        np.testing.assert_allclose(readout.bias.detach().numpy(), wanted[-1], atol=2e-4, rtol=1e-3)


def test_a_module_without_a_readout_is_not_fitted() -> None:
    module = nn.Linear(4, 4)
    before = module.weight.detach().clone()
    assert not fit_readout(
        module, [Tap(torch.randn(1, 2, 4), torch.randn(1, 2, 4), None)], 0.1, torch.device("cpu")
    )
    assert torch.equal(module.weight, before)
    broken = operators.build("hyena_x", dim=8)
    before = broken.out_proj.weight.detach().clone()
    nan = Tap(torch.full((1, 4, 8), float("nan")), torch.randn(1, 4, 8), None)
    assert not fit_readout(broken, [nan], 0.1, torch.device("cpu"))
    assert torch.equal(broken.out_proj.weight, before)


def test_operators_learn_independently(teacher: nn.Module, data: ImageLabelDataset) -> None:
    """One pass for all is what one operator at a time would be, bit for bit."""
    a = Replace("mha", [1], "hyena_x")
    together = graft(
        teacher, GraftPlan([a, Replace("mha", [3], "hyena_y"), Replace("mlp", [0], "mlp", {"ratio": 2})])
    )
    alone = graft(teacher, GraftPlan([a]))
    distill(together, teacher, data, STAGE_1)
    distill(alone, teacher, data, STAGE_1)
    assert states_equal(together.blocks[1].attn, alone.blocks[1].attn)
    fresh = graft(teacher, GraftPlan([a]))
    assert not states_equal(alone.blocks[1].attn, fresh.blocks[1].attn)


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_loss_of_a_step_is_the_regression_on_the_teacher_s_input(
    teacher: nn.Module, data: ImageLabelDataset, loss: str, scaled: bool
) -> None:
    plan = GraftPlan([Replace("mha", [2], "hyena_y", init="random", loss=loss, scale_by_gate=scaled)])
    student, journal = graft(teacher, plan), Quiet()
    operator = copy.deepcopy(student.blocks[2].attn)
    distill(student, teacher, data, {**STAGE_1, "steps": 1, "log_every": 1}, journal=journal)
    train, _ = split(data, 8, 0)
    batch = batches(train, teacher).at(step_index(0, 16))
    tap = family_of(teacher).taps(teacher, batch.x_t, batch.t, batch.cond, ["blocks.2.attn"])["blocks.2.attn"]
    with torch.no_grad():
        output, target = operator(tap.input), tap.output
    if scaled:
        output, target = output * tap.gate, target * tap.gate
    difference = output - target
    wanted = {
        "l1": difference.abs(), "l2": difference.square(),
        "huber": torch.where(difference.abs() < 1, 0.5 * difference.square(), difference.abs() - 0.5),
    }[loss].mean()  # fmt: skip
    (record,) = [r for r in journal.records if "loss" in r]
    assert record["loss"]["blocks.2.attn"] == pytest.approx(wanted.item(), rel=1e-5)


def test_losses_default_to_l1_for_mha_and_l2_for_mlp(teacher: nn.Module, data: ImageLabelDataset) -> None:
    assert DistillConfig().losses == {"mha": "l1", "mlp": "l2", "block_group": "l1"}
    student = graft(
        teacher, GraftPlan([Replace("mha", [1], "swa"), Replace("mlp", [1], "mlp", {"ratio": 2})])
    )
    result = distill(student, teacher, data, {**STAGE_1, "steps": 1})
    assert result.losses == {"blocks.1.attn": "l1", "blocks.1.mlp": "l2"}


def test_naming_the_loss_of_one_target_leaves_the_other_at_its_default(
    teacher: nn.Module, data: ImageLabelDataset
) -> None:
    plan = GraftPlan([Replace("mlp", [0], "mlp", {"ratio": 2}, init="random")])
    config = {**STAGE_1, "steps": 2, "num_validation": 0}
    first = []
    for losses in ({"mha": "huber"}, {"mlp": "l2"}, {"mlp": "l1"}):
        student, journal = graft(teacher, plan), Quiet()
        distill(student, teacher, data, {**config, "losses": losses}, journal=journal)
        first.append(next(r["loss"]["blocks.0.mlp"] for r in journal.records if "loss" in r))
    assert first[0] == first[1] != first[2]
    with pytest.raises(RunError, match="mha"):
        distill(student, teacher, data, {"losses": {"swa": "l1"}})


def test_the_best_weights_are_kept(teacher: nn.Module, data: ImageLabelDataset) -> None:
    student, journal = graft(teacher, RANDOM), Quiet()
    wild = {**STAGE_1, "lr": 0.3, "schedule": "constant", "early_stop": 0}
    result = distill(student, teacher, data, wild, journal=journal)
    seen = [r["error"] for r in journal.records if r.get("event") == "validation"]
    for path, error in result.final_error.items():
        errors = {0: result.start_error["random"][path], **{4 * (i + 1): e[path] for i, e in enumerate(seen)}}
        assert error == pytest.approx(min(errors.values()), rel=1e-6)
        assert errors[result.best_step[path]] == min(errors.values())
        assert errors[24] > error  # otherwise this shows nothing
    last = graft(teacher, RANDOM)
    assert distill(last, teacher, data, {**wild, "keep_best": False}).final_error == pytest.approx(seen[-1])


def test_an_operator_without_progress_rests(teacher: nn.Module, data: ImageLabelDataset) -> None:
    plan = GraftPlan([Replace("mha", [0], "mha"), Replace("mha", [1], "hyena_x", init="random")])
    student, journal = graft(teacher, plan), Quiet()
    config = {**STAGE_1, "early_stop": 2, "steps": 40, "fit_readout": False, "lr": 3e-3}
    result = distill(student, teacher, data, config, journal=journal)
    assert result.start_error["copied"]["blocks.0.attn"] == 0  # the donor itself: nothing to gain
    assert result.rested["blocks.0.attn"] == 8
    assert result.final_error["blocks.0.attn"] == 0
    assert "blocks.1.attn" not in result.rested
    rests = [r for r in journal.records if r.get("event") == "rest"]
    assert [(r["path"], r["step"]) for r in rests] == [("blocks.0.attn", 8)]
    after = [r["loss"] for r in journal.records if "loss" in r and r["step"] > 9]
    assert after
    assert all(set(losses) == {"blocks.1.attn"} for losses in after)


def test_stage_1_ends_when_all_rest(teacher: nn.Module, data: ImageLabelDataset) -> None:
    student = graft(teacher, GraftPlan([Replace("mha", [0, 1], "mha")]))
    journal = Quiet()
    distill(student, teacher, data, {**STAGE_1, "early_stop": 1, "steps": 10_000}, journal=journal)
    assert max(r["step"] for r in journal.records) < 50
    assert torch.equal(prediction(student), prediction(teacher))


def test_operators_that_say_train_false_stay_as_they_are(teacher: nn.Module, data: ImageLabelDataset) -> None:
    plan = GraftPlan([Replace("mha", [0], "swa", train=False), Replace("mha", [1], "hyena_x")])
    student = graft(teacher, plan)
    fixed = copy.deepcopy(student.blocks[0].attn)
    assert set(distill(student, teacher, data, STAGE_1).final_error) == {"blocks.1.attn"}
    finetune(student, data, {**STAGE_1, "steps": 3})
    assert states_equal(student.blocks[0].attn, fixed)


def test_cached_mode_learns_and_leaves_no_file(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    student = graft(teacher, RANDOM)
    config = {**STAGE_1, "mode": "cached", "cache_samples": 40, "steps": 60}
    result = distill(student, teacher, data, config)
    assert (
        result.cache_bytes == 40 * 2 * (2 * 16 + 1) * 32 * 2
    )  # samples, sites, tokens and gate, width, two bytes
    for path, error in result.final_error.items():
        assert error < 0.8 * result.start_error["random"][path]
    assert list(tmp_path.glob("grafting-*")) == []
    with pytest.raises(RunError, match=r"GB on disk .*one-pass"):
        distill(graft(teacher, RANDOM), teacher, data, {**config, "cache_limit_gb": 1e-6})
    enough_for_one = 1.5 * result.cache_bytes / 1e9
    distill(graft(teacher, RANDOM), teacher, data, {**config, "steps": 1, "cache_limit_gb": enough_for_one})
    several = settings(DistillConfig, {**config, "cache_limit_gb": enough_for_one}, "distill")
    pupils = pupils_of(family_of(student), student, teacher, several)
    two: Any = SimpleNamespace(world=2, from_main=lambda value: value)
    stage: Any = SimpleNamespace(config=several, compute=two, journal=Quiet(), pupils=pupils)
    with pytest.raises(RunError, match="in each of 2 processes"):
        ActivationCache.collect(stage, [pupil.path for pupil in pupils])
    assert list(tmp_path.glob("grafting-*")) == []


@pytest.mark.parametrize("mode", ["one-pass", "cached"])
def test_both_stages_run_on_bf16_weights(teacher: nn.Module, data: ImageLabelDataset, mode: str) -> None:
    low = copy.deepcopy(teacher).to(torch.bfloat16)
    plan = GraftPlan(
        [Replace("mha", [1], "hyena_x"), Replace("mha", [2], "mamba2", {"d_state": 8, "head_dim": 8})]
    )
    student = graft(low, plan)
    result = distill(student, low, data, {**STAGE_1, "mode": mode, "steps": 30, "cache_samples": 40})
    for path, error in result.final_error.items():
        assert error < 0.9 * result.start_error["random"][path]
    finetune(
        student, data, {**STAGE_1, "steps": 3, "objectives": {"output": 1.0, "features": 1.0}}, teacher=low
    )
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    x = torch.randn(2, 1, 8, 8)
    assert diffusion.sample(student, x, torch.tensor([0, 1]), steps=2, guidance=1.5).dtype == torch.float32


@pytest.mark.parametrize("mode", ["one-pass", "cached"])
def test_no_pass_has_more_samples_than_a_micro_batch(
    teacher: nn.Module, data: ImageLabelDataset, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out errors, calibration and previews too: a recipe that trains in parts must not run out of memory there."""
    sizes: list[int] = []
    family = type(family_of(teacher))
    for name in ("taps", "predict", "predict_guided"):

        def noted(self: Any, model: nn.Module, x: Tensor, *rest: Any, of: Any = getattr(family, name)) -> Any:
            sizes.append(len(x))
            return of(self, model, x, *rest)

        monkeypatch.setattr(family, name, noted)
    student = graft(teacher, GraftPlan([Replace("mha", [0, 2], "hyena_x", loss="auto")]))
    common = {"steps": 3, "batch_size": 8, "num_validation": 10, "precision": "fp32", "warmup": 0}
    whole = distill(student, teacher, data, {**common, "mode": mode, "cache_samples": 16})
    finetune(copy.deepcopy(student), data, {**common, "preview_every": 2})
    assert max(sizes) == 8
    sizes.clear()
    student = graft(teacher, GraftPlan([Replace("mha", [0, 2], "hyena_x", loss="auto")]))
    parts = distill(student, teacher, data, {**common, "mode": mode, "cache_samples": 16, "micro_batch": 3})
    finetune(copy.deepcopy(student), data, {**common, "preview_every": 2, "micro_batch": 3})
    assert max(sizes) == 3
    for path, error in whole.final_error.items():
        assert parts.final_error[path] == pytest.approx(error, rel=1e-3)
        for start, errors in whole.start_error.items():
            assert parts.start_error[start][path] == pytest.approx(errors[path], rel=1e-4)


def test_readouts_fitted_in_turns_are_those_fitted_at_once(
    teacher: nn.Module, data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = GraftPlan([Replace("mha", "all", "hyena_x"), Replace("mlp", [0, 1], "mlp", {"ratio": 2})])
    found = []
    for limit, turns in ((starts.FIT_BYTES, 1), (1, 6), (8 * (33 * 65 + 65 * 97), 3)):
        monkeypatch.setattr(starts, "FIT_BYTES", limit)
        student = graft(teacher, plan)
        modules = {path: student.get_submodule(path) for path in edited_sites(student)}
        assert len(starts.in_turns(modules)) == turns
        found.append(distill(student, teacher, data, {**STAGE_1, "steps": 1}).start_error["fitted"])
    assert found[0] == found[1] == found[2]

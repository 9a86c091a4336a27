"""Both stages on a tiny DiT: closed forms, independence, bit-identical resume, and what happens when it goes wrong."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import prediction, tiny_dit
from torch import Tensor, nn

from grafting import GraftPlan, Replace, diffusion, distill, finetune, graft, operators
from grafting.data import ImageLabelDataset
from grafting.errors import DataError, DivergedError, GraftError, PlanError, RunError
from grafting.families import Tap, family_of
from grafting.runs import RunFolder
from grafting.training.config import DistillConfig, FinetuneConfig, settings
from grafting.training.initialization import fit_readout
from grafting.training.loop import EMA, Batches, Interrupted, Quiet, learning_rate, split, step_index
from grafting.training.objectives import feature_loss, mixed_loss

RANDOM = GraftPlan([Replace("mha", [1, 3], "hyena_x", init="random")])
CHECK = {"precision": "fp32", "batch_size": 16, "num_validation": 8, "warmup": 2}
STAGE_1: dict[str, Any] = {
    **CHECK,
    "steps": 24,
    "lr": 3e-3,
    "validate_every": 4,
    "checkpoint_every": 8,
    "log_every": 3,
}
STAGE_2: dict[str, Any] = {
    **STAGE_1,
    "lr": 1e-3,
    "objectives": {"diffusion": 0.5, "output": 1.0, "features": 0.1},
}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_dit()


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[n], second[n]) for n in first)


def batches(data: ImageLabelDataset, model: nn.Module, purpose: str = "distill", **changes: Any) -> Batches:
    arguments = {
        "seed": 0,
        "purpose": purpose,
        "label_dropout": 0.1,
        "device": torch.device("cpu"),
        **changes,
    }
    return Batches(data, family_of(model), model, **arguments)


# ---- stage 1


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


# ---- stage 2


def test_stage_2_is_adamw_on_the_dit_loss(data: ImageLabelDataset) -> None:
    """Three steps against a plain loop: the same batches, gradients, clipping and schedule."""
    student, manual = tiny_dit(seed=2), tiny_dit(seed=2)
    config = {
        **CHECK,
        "steps": 3,
        "lr": 1e-3,
        "ema_decay": 0.0,
        "clip": 0.5,
        "schedule": "constant",
        "warmup": 0,
    }
    finetune(student, data, config)
    train, _ = split(data, 8, 0)
    stream = batches(train, manual, "finetune")
    parameters = [p for p in manual.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(3):
        batch = stream.at(step_index(step, 16))
        assert torch.equal(batch.x_t, diffusion.add_noise(batch.x0, batch.t, batch.noise))
        loss = diffusion.training_losses(manual, batch.x0, batch.t, batch.cond, batch.noise)["loss"].mean()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        for p in parameters:
            p.grad.mul_(min(1.0, 0.5 / (norm.item() + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(student.named_parameters(), manual.parameters(), strict=True):
        assert (a - b).abs().max() < 2e-5, name
    assert torch.equal(student.pos_embed, manual.pos_embed)


@pytest.mark.parametrize(
    "objectives",
    [{"diffusion": 1.0}, {"output": 1.0}, {"features": 1.0}, {"diffusion": 0.1, "output": 1.0}],
    ids=str,
)
def test_every_objective_goes_down(
    teacher: nn.Module, data: ImageLabelDataset, objectives: dict[str, float]
) -> None:
    student = graft(teacher, RANDOM)
    family = family_of(student)
    probe = batches(data, teacher, "probe").at(torch.arange(64))
    layers = tuple(range(4))
    config = FinetuneConfig(objectives=objectives)

    def value() -> float:
        with torch.no_grad():
            return mixed_loss(family, student, teacher, probe, config, layers)[0].item()

    before = value()
    result = finetune(
        student, data, {**STAGE_1, "steps": 60, "lr": 1e-3, "objectives": objectives}, teacher=teacher
    )
    assert value() < 0.9 * before
    if "diffusion" in objectives:
        assert result.validation[60] < result.validation[0]
    assert not student.training


def test_objectives_in_closed_form(teacher: nn.Module, data: ImageLabelDataset) -> None:
    student, family = graft(teacher, RANDOM), family_of(teacher)
    batch = batches(data, teacher).at(torch.arange(16))
    weights = {"diffusion": 0.3, "output": 2.0, "features": 0.7}
    config = FinetuneConfig(
        objectives=weights, feature_outliers=0.0, output_snr_cap=20.0, output_variance=0.5
    )
    loss, terms = mixed_loss(family, student, teacher, batch, config, (0, 3))
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    weight = ((1 - alpha_bar) / alpha_bar).clamp(1, 20)
    weight = (weight / weight.mean())[batch.t].float()
    with torch.no_grad():
        a, mine = family.predict_with_features(student, batch.x_t, batch.t, batch.cond, (0, 3))
        b, theirs = family.predict_with_features(teacher, batch.x_t, batch.t, batch.cond, (0, 3))
        wanted = {
            "output": (weight * (a - b)[:, : batch.x0.shape[1]].square().mean((1, 2, 3))).mean()
            + 0.5 * F.mse_loss(a[:, batch.x0.shape[1] :], b[:, batch.x0.shape[1] :]),
            "diffusion": diffusion.loss_from_output(a, batch.x0, batch.t, batch.noise)["loss"].mean(),
            "features": sum(
                ((mine[i] - theirs[i]).square().sum((1, 2)) / theirs[i].square().sum((1, 2))).mean()
                for i in (0, 3)
            )
            / 2,
        }
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], torch.as_tensor(value), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        loss.detach(), sum(weights[n] * wanted[n] for n in weights), rtol=1e-4, atol=1e-6
    )


def test_outliers_do_not_own_the_feature_loss() -> None:
    torch.manual_seed(0)
    target = torch.randn(4, 16, 32)
    target[0, 0, 0] = 1e4
    student = target + 0.1 * torch.randn_like(target)
    student[0, 0, 0] = 0
    with_it = feature_loss({0: student}, {0: target}, 0.0).item()
    without = feature_loss({0: student}, {0: target}, 1e-3).item()
    # One of four samples is its outlier and nothing else, each counts by itself: (1 + 3 * 0.01) / 4.
    assert with_it == pytest.approx(0.2575, abs=1e-3)
    assert without == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("what", ["all", "blocks", "operators"])
def test_only_what_is_trained_moves(teacher: nn.Module, data: ImageLabelDataset, what: str) -> None:
    student = graft(teacher, RANDOM)
    before = copy.deepcopy(student.state_dict())
    result = finetune(student, data, {**STAGE_1, "steps": 3, "train": what})
    moved = {n for n, t in student.state_dict().items() if not torch.equal(t, before[n])}
    prefixes = {
        "all": ("",), "blocks": ("blocks.1.", "blocks.3."), "operators": ("blocks.1.attn.", "blocks.3.attn."),
    }[what]  # fmt: skip
    wanted = {n for n, p in student.named_parameters() if n.startswith(prefixes) and n != "pos_embed"}
    assert moved == wanted
    assert result.trained_params == sum(student.get_parameter(n).numel() for n in wanted)
    assert all(p.requires_grad for n, p in student.named_parameters() if n != "pos_embed")


def test_the_moving_average_in_closed_form() -> None:
    values = torch.randn(12, 5, dtype=torch.float64)
    parameter = nn.Parameter(values[0].clone())
    ema = EMA({"p": parameter}, 0.5)
    wanted = values[0].clone()
    for step in range(11):
        parameter.data = values[step + 1].clone()
        ema.update({"p": parameter}, step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * values[step + 1]
    torch.testing.assert_close(ema.values["p"], wanted)
    ema.swap({"p": parameter})
    torch.testing.assert_close(parameter.data, wanted)
    ema.swap({"p": parameter})
    assert torch.equal(parameter.data, values[11])
    torch.testing.assert_close(ema.values["p"], wanted)


def test_the_average_of_bf16_parameters_moves_by_less_than_their_rounding() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = EMA({"p": parameter}, 0.999)
    parameter.data = torch.full((4,), 1.0625, dtype=torch.bfloat16)
    for step in range(10_000, 10_100):
        ema.update({"p": parameter}, step)
        ema.swap({"p": parameter})
        ema.swap({"p": parameter})
    torch.testing.assert_close(ema.values["p"], torch.full((4,), 1.0625 - 0.0625 * 0.999**100))
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter.data, torch.full((4,), 1.0625, dtype=torch.bfloat16))


def test_the_horizon_of_the_average_is_a_share_of_the_run(
    teacher: nn.Module, data: ImageLabelDataset
) -> None:
    short = {**STAGE_1, "steps": 20, "num_validation": 0}
    assert finetune(graft(teacher, RANDOM), data, {**short, "ema_horizon": 0.5}).ema_decay == pytest.approx(
        0.9
    )
    assert finetune(graft(teacher, RANDOM), data, {**short, "ema_decay": 0.9999}).ema_decay == 0.9999


def test_the_learning_rate_in_closed_form() -> None:
    config = settings(FinetuneConfig, {"steps": 100, "warmup": 10, "lr": 1.0, "schedule": "cosine"}, "x")
    found = [learning_rate(config, step) for step in range(100)]
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])
    halving = config.model_copy(update={"schedule": "halving", "halve_at": (0.25, 0.5)})
    assert [learning_rate(halving, s) for s in (9, 24, 25, 49, 50, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    constant = config.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, s) for s in range(10, 100)} == {1.0}


def test_label_dropout_and_timesteps_are_drawn_as_said(data: ImageLabelDataset, teacher: nn.Module) -> None:
    stream = batches(data, teacher, label_dropout=0.25)
    whole = stream.at(torch.arange(4000))
    dropped = (whole.cond == 4).double().mean().item()
    assert abs(dropped - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert abs(whole.t.double().mean().item() - 499.5) < 4 * 289 / math.sqrt(4000)
    part = stream.at(torch.arange(130, 150))
    for name in ("x0", "x_t", "t", "cond", "noise"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[130:150])
    plain = batches(data, teacher, label_dropout=0.0).at(torch.arange(80))
    assert torch.bincount(plain.cond, minlength=4).tolist() == [
        20,
        20,
        20,
        20,
    ]  # one epoch: every sample once
    assert len({tuple(row.flatten().tolist()) for row in plain.x0}) == 80


# ---- stop and resume


class Stopping(RunFolder):
    """A run folder that asks its stage to stop before step `at`."""

    at: int | None = None
    asked = 0

    def stop_requested(self) -> int | None:
        self.asked += 1
        return 143 if self.asked == self.at else None


def run_stage(
    stage: str, teacher: nn.Module, data: ImageLabelDataset, folder: RunFolder, **changes: Any
) -> nn.Module:
    plan = GraftPlan(
        [Replace("mha", [1, 3], "hyena_x"), Replace("mlp", [0], "mlp", {"ratio": 2}, init="random")]
    )
    student = graft(teacher, plan)
    if stage == "distill":
        distill(student, teacher, data, {**STAGE_1, "early_stop": 1, **changes}, journal=folder)
    else:
        finetune(student, data, {**STAGE_2, **changes}, teacher=teacher, journal=folder)
    return student


@pytest.mark.parametrize("stage", ["distill", "finetune"])
@pytest.mark.parametrize("at", [1, 2, 9, 14, 24])
def test_a_stopped_stage_goes_on_to_the_same_bits(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path, stage: str, at: int
) -> None:
    whole = RunFolder(tmp_path / "whole")
    whole.path.mkdir()
    wanted = run_stage(stage, teacher, data, whole)
    folder = Stopping(tmp_path / "cut")
    folder.path.mkdir()
    folder.at = at
    with pytest.raises(Interrupted) as stop:
        run_stage(stage, teacher, data, folder)
    assert (stop.value.code, f"step {at - 1}" in str(stop.value)) == (143, True)
    resumed = RunFolder(tmp_path / "cut")
    found = run_stage(stage, teacher, data, resumed)
    assert states_equal(found, wanted)
    assert resumed.metrics() == whole.metrics()


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_killed_stage_goes_on_from_its_last_checkpoint(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path, stage: str
) -> None:
    """As after SIGKILL: checkpoints of steps 8 and 16 and metrics up to 21; then with the newest damaged."""
    whole = RunFolder(tmp_path / "whole")
    whole.path.mkdir()
    wanted = run_stage(stage, teacher, data, whole, keep_checkpoints=9)
    for damage in (None, "cut", "flip", "no manifest", "both"):
        folder = RunFolder(tmp_path / f"killed {damage}")
        checkpoints = folder.path / "checkpoints" / stage
        checkpoints.mkdir(parents=True)
        source = whole.path / "checkpoints" / stage
        for file in sorted(source.iterdir()):
            if int(file.stem) <= 16:
                (checkpoints / file.name).write_bytes(file.read_bytes())
        assert len(list(checkpoints.iterdir())) == 4
        newest = checkpoints / "000000016.pt"
        content = bytearray(newest.read_bytes())
        if damage == "cut":
            newest.write_bytes(content[:-1000])
        elif damage == "flip":
            content[len(content) // 2] ^= 1
            newest.write_bytes(content)
        elif damage == "no manifest":
            newest.with_suffix(".json").unlink()
        elif damage == "both":
            newest.write_bytes(b"")
            (checkpoints / "000000008.pt").write_bytes(b"")
        lines = (whole.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        early = [line for line in lines if int(line.split('"step": ')[1].split(",")[0]) <= 21]
        (folder.path / "metrics.jsonl").write_text("".join(early) + early[-1][:7])  # a torn last line
        found = run_stage(stage, teacher, data, folder)
        assert states_equal(found, wanted), damage
        assert folder.metrics() == whole.metrics(), damage


class Poisoned:
    """Data that turns to NaN from the given call on."""

    def __init__(self, data: ImageLabelDataset, calls: int) -> None:
        self.data, self.calls = data, calls
        self.name, self.shape, self.num_classes = data.name, data.shape, data.num_classes
        self.content_hash = data.content_hash

    def __len__(self) -> int:
        return len(self.data)

    def split(self, num_validation: int, seed: int = 0) -> tuple[Any, Any]:
        train, validation = self.data.split(num_validation, seed)
        return Poisoned(train, self.calls), validation

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        self.calls -= 1
        x, y = self.data.batch(indices)
        return (x * float("nan") if self.calls < 0 else x), y


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path, stage: str
) -> None:
    folder = RunFolder(tmp_path)
    calls = 13 + (stage == "distill")  # stage 1 reads one batch more, to fit the readouts
    with pytest.raises(DivergedError, match=r"diverged.*lower lr") as caught:
        run_stage(stage, teacher, Poisoned(data, calls), folder, early_stop=0, fit_samples=16) if (
            stage == "distill"
        ) else run_stage(stage, teacher, Poisoned(data, calls), folder)
    assert caught.value.exit_code == 3
    kept = sorted((tmp_path / "checkpoints" / stage).glob("*.pt"))
    assert [file.stem for file in kept] == ["000000008"]
    state = folder.load_checkpoint(stage)
    tensors = state["parameters"] if stage == "finetune" else state["pupils"]["blocks.1.attn"]["state"]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    # and with good data it goes on
    found = run_stage(stage, teacher, data, folder)
    assert prediction(found).isfinite().all()


def test_a_learning_rate_that_is_far_too_large_is_told_as_such(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(DivergedError, match="lr"):
        run_stage("finetune", teacher, data, folder, lr=1e30, warmup=0, max_bad_steps=2)
    with pytest.raises(DivergedError, match="lr"):
        run_stage("distill", teacher, data, folder, lr=1e30, warmup=0, early_stop=0)


# ---- bad input


def test_data_that_does_not_fit_is_refused(teacher: nn.Module) -> None:
    def of(shape: tuple[int, ...], classes: int = 4) -> ImageLabelDataset:
        return ImageLabelDataset(torch.zeros(12, *shape), torch.arange(12) % 4, num_classes=classes)

    student = graft(teacher, RANDOM)
    before = copy.deepcopy(student.state_dict())
    for bad in (of((3, 8, 8)), of((1, 16, 16)), of((1, 8, 8), classes=5)):
        with pytest.raises(DataError, match="model"):
            distill(student, teacher, bad, STAGE_1)
        with pytest.raises(DataError, match="model"):
            finetune(student, bad, STAGE_1)
    with pytest.raises(DataError, match="not finite"):
        ImageLabelDataset(torch.full((2, 1, 8, 8), float("nan")), torch.tensor([0, 1]))
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_a_student_without_a_plan_or_of_another_shape_is_refused(
    teacher: nn.Module, data: ImageLabelDataset
) -> None:
    with pytest.raises(PlanError, match="no replaced operators"):
        distill(tiny_dit(), teacher, data, STAGE_1)
    with pytest.raises(PlanError, match="no replaced operators"):
        finetune(tiny_dit(), data, {**STAGE_1, "train": "operators"})
    with pytest.raises(RunError, match="teacher="):
        finetune(graft(teacher, RANDOM), data, {**STAGE_1, "objectives": {"output": 1.0}})
    student = graft(teacher, RANDOM)
    with pytest.raises(PlanError, match="teacher is the student"):
        distill(student, student, data, STAGE_1)
    for other in (
        tiny_dit(hidden_size=64),
        tiny_dit(depth=2),
        tiny_dit(in_channels=2),
        tiny_dit(patch_size=4),
    ):
        with pytest.raises(GraftError, match="teacher"):
            distill(student, other, data, STAGE_1)
        with pytest.raises(GraftError, match="teacher"):
            finetune(student, data, {**STAGE_1, "objectives": {"features": 1.0}}, teacher=other)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"stesp": 3}, "steps"), ({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"lr": float("nan")}, "lr"),
        ({"batch_size": 2.5}, "batch_size"), ({"clip": 0}, "clip"), ({"label_dropout": 1.0}, "label_dropout"),
        ({"precision": "fp8"}, "precision"), ({"seed": -1}, "seed"), (3, "mapping"), ({"betas": [0.9]}, "betas"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(
    teacher: nn.Module, data: ImageLabelDataset, config: Any, word: str
) -> None:
    student = graft(teacher, RANDOM)
    for act in (lambda: distill(student, teacher, data, config), lambda: finetune(student, data, config)):
        with pytest.raises(RunError, match=word) as caught:
            act()
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="objectives"):
        finetune(student, data, {"objectives": {"diffusion": 0.0}})
    with pytest.raises(RunError, match="objectives"):
        finetune(student, data, {"objectives": {"difusion": 1.0}})

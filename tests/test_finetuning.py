"""Stage 2 on a tiny DiT: against a plain loop and in closed form."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_dit
from stage_tools import CHECK, RANDOM, STAGE_1, batches
from torch import nn

from grafting import diffusion, finetune, graft
from grafting.data import ImageLabelDataset
from grafting.families import family_of
from grafting.training.config import FinetuneConfig, settings
from grafting.training.loop import EMA, learning_rate, split, step_index
from grafting.training.objectives import feature_loss, mixed_loss


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_dit()


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
    linear = config.model_copy(update={"schedule": "linear"})
    assert [learning_rate(linear, s) for s in range(10, 100)] == pytest.approx(
        [1 - i / 90 for i in range(90)]
    )
    halving = config.model_copy(update={"schedule": "halving", "halve_at": (0.25, 0.5)})
    assert [learning_rate(halving, s) for s in (9, 24, 25, 49, 50, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    constant = config.model_copy(update={"schedule": "constant"})
    assert {learning_rate(constant, s) for s in range(10, 100)} == {1.0}


def test_spread_timesteps_cover_all_noise_levels_in_every_batch(
    data: ImageLabelDataset, teacher: nn.Module
) -> None:
    stream = batches(data, teacher, spread=True)
    for step in range(5):
        t = stream.at(torch.arange(50 * step, 50 * step + 50)).t
        assert torch.histc(t.float(), bins=5, min=0, max=1000).sub(10).abs().max() <= 2
    assert torch.equal(stream.at(torch.arange(7, 12)).t, stream.at(torch.arange(20)).t[7:12])
    drawn = {}
    for kind in ("uniform", "spread"):
        student = graft(teacher, RANDOM)
        finetune(student, data, {**STAGE_1, "steps": 3, "num_validation": 0, "timesteps": kind})
        drawn[kind] = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert not torch.equal(drawn["uniform"], drawn["spread"])


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

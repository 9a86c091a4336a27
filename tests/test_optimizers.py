"""Muon takes the matrices of linear layers, AdamW the rest; both as torch has them, and resumable."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import tiny_dit
from torch import nn

from grafting.training.config import FinetuneConfig
from grafting.training.optimizers import BadSteps, make_optimizer


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def with_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in trained(model):
        parameter.grad = torch.randn_like(parameter)


def test_each_parameter_moves_as_in_its_own_optimizer() -> None:
    config = FinetuneConfig(optimizer="muon", lr=1e-2)
    model = tiny_dit()
    ours, other = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make_optimizer(ours, [trained(ours)], config)
    linear = {f"{name}.weight" for name, m in other.named_modules() if isinstance(m, nn.Linear)}
    matrices = [p for name, p in other.named_parameters() if name in linear]
    rest = [p for name, p in other.named_parameters() if name not in linear and p.requires_grad]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=config.betas, weight_decay=0.0)
    for step in range(3):
        with_gradients(ours, step)
        with_gradients(other, step)
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
    assert linear
    assert any("embedding_table" in name for name, p in other.named_parameters() if any(p is q for q in rest))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_survives_a_round_trip(name: str) -> None:
    config = FinetuneConfig(optimizer=name)
    whole = tiny_dit()
    a = make_optimizer(whole, [trained(whole)], config)
    with_gradients(whole, 0)
    a.step()
    again = copy.deepcopy(whole)
    b = make_optimizer(again, [trained(again)], config)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for model, optimizer in ((whole, a), (again, b)):
        with_gradients(model, 1)
        optimizer.set_learning_rate(3e-4)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_with_bad_gradients_changes_nothing_and_is_counted(name: str) -> None:
    model, untouched = tiny_dit(), tiny_dit()
    plain, skipping = (
        make_optimizer(m, [trained(m)], FinetuneConfig(optimizer=name)) for m in (untouched, model)
    )
    bad = BadSteps(torch.device("cpu"))
    for step, norm in enumerate([1.0, float("nan"), float("inf"), 2.0]):
        with_gradients(model, step)
        if not math.isfinite(norm):
            trained(model)[0].grad = torch.full_like(trained(model)[0], norm)
        skipping.step(bad.note(torch.tensor(norm)))
        if math.isfinite(norm):
            with_gradients(untouched, step)
            plain.step()
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert str(skipping.state_dict()) == str(plain.state_dict())
    assert (bad.skipped, bad.in_a_row, bad.longest) == (2, 0, 2)
    again = BadSteps(torch.device("cpu"), 5, 3)
    again.note(torch.tensor(float("inf")))
    assert (again.skipped, again.in_a_row, again.longest) == (6, 4, 4)

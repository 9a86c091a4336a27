"""Muon takes the matrices of linear layers, AdamW the rest; both as torch has them, and resumable.

Muon's products are in bf16, as torch has them, where the hardware is fast at that, and in float32 elsewhere.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from torch import nn

from grafting.training import muon
from grafting.training.config import FinetuneConfig
from grafting.training.optimizers import BadSteps, make_optimizer


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def with_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in trained(model):
        parameter.grad = torch.randn_like(parameter)


def test_each_parameter_moves_as_in_its_own_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "multiplies_bf16_fast", lambda device: True)
    config = FinetuneConfig(optimizer="muon", lr=1e-2)
    model = tiny_dit()
    ours, other = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make_optimizer(ours, [trained(ours)], config)
    linear = {f"{name}.weight" for name, m in other.named_modules() if isinstance(m, nn.Linear)}
    matrices = [p for name, p in other.named_parameters() if name in linear]
    rest = [p for name, p in other.named_parameters() if name not in linear and p.requires_grad]
    published = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=config.betas, weight_decay=0.0)
    for step in range(3):
        with_gradients(ours, step)
        with_gradients(other, step)
        optimizer.step()
        published.step()
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
    assert linear
    assert any("embedding_table" in name for name, p in other.named_parameters() if any(p is q for q in rest))


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"nesterov": False, "adjust_lr_fn": "original"}])
def test_muon_is_torch_s_to_the_bit_where_bf16_is_fast(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "multiplies_bf16_fast", lambda device: True)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((12, 5), (5, 12), (8, 8), (3, 3))]
    theirs = copy.deepcopy(ours)
    optimizers = muon.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for a, b in zip(ours[:3], theirs[:3], strict=True):  # the last one has no gradient and stays
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert str(optimizers[0].state_dict()) == str(optimizers[1].state_dict())


def test_muon_in_float32_is_nearer_to_the_exact_iteration() -> None:
    """Against float64; bf16 is off by a hundredth."""
    torch.manual_seed(0)
    matrix, how = torch.randn(48, 16, dtype=torch.float64), ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    exact = muon.orthogonalised(matrix, *how)
    values = torch.linalg.svdvals(exact)
    assert 0.6 < values.min() < values.max() < 1.3
    single = muon.orthogonalised(matrix.float(), *how)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)
    rounded = muon.orthogonalised(matrix.bfloat16(), *how).double()
    assert 1e-3 < (rounded - exact).abs().max() < 0.1


def test_muon_takes_the_type_that_the_device_is_fast_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = muon.orthogonalised
    monkeypatch.setattr(muon, "orthogonalised", lambda x, *how: seen.append(x.dtype) or whole(x, *how))
    for fast in (False, True):
        monkeypatch.setattr(muon, "multiplies_bf16_fast", lambda device, fast=fast: fast)
        parameter = nn.Parameter(torch.ones(4, 2))
        parameter.grad = torch.randn(4, 2)
        muon.Muon([parameter]).step()
        assert parameter.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


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

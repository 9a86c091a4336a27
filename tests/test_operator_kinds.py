"""What is particular to each operator: its definition computed another way, what a token sees, its donor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_tools import DIM, HEADS, TOKENS, attention_donor, mlp_donor, small
from torch import Tensor

from grafting import operators
from grafting.errors import OperatorError
from grafting.operators.attention import split_heads, window_attention
from grafting.operators.filters import causal_channel_filter, causal_filter
from grafting.operators.ssd import carried_states, ssd

# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 4, 9, 40])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 64, 100])
def test_window_attention_is_masked_full_attention(window: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, num_tokens, 8, requires_grad=True) for _ in range(3))
    index = torch.arange(num_tokens)
    mask = (index[:, None] - index[None, :]).abs() <= window
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = window_attention(q, k, v, window)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(y)
    for mine, reference in zip(
        torch.autograd.grad((y * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_window_attention_reaches_the_window_and_no_further() -> None:
    module = small("swa", num_tokens=40, window=3)
    x = torch.randn(1, 40, DIM, requires_grad=True)
    module(x)[0, 20].sum().backward()
    assert x.grad is not None
    touched = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == list(range(17, 24))


def test_swa_of_a_window_that_covers_everything_is_mha() -> None:
    mha, swa = small("mha"), small("swa", window=TOKENS)
    operators.copy_donor(mha, attention_donor())
    operators.copy_donor(swa, attention_donor())
    x = torch.randn(2, TOKENS, DIM)
    torch.testing.assert_close(mha(x), swa(x))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_copies_its_donor_exactly(bias: bool) -> None:
    donor = attention_donor(bias=bias)
    module = small("mha")
    operators.copy_donor(module, donor)
    x = torch.randn(2, TOKENS, DIM)
    weights = (donor.q_weight, donor.k_weight, donor.v_weight)
    biases = (donor.q_bias, donor.k_bias, donor.v_bias)
    qkv = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    y = F.scaled_dot_product_attention(*split_heads(torch.cat(qkv, -1), HEADS)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), F.linear(y, donor.out_weight, donor.out_bias))


# --- convolutions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [1, 2, 4, 16, 17, 40])
def test_filters_are_causal_depthwise_convolutions(taps: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 1, taps), torch.randn(6)
    padded = F.pad(x, (0, 0, taps - 1, 0))
    expected = torch.stack([(padded[:, n : n + taps] * weight[:, 0].T).sum(1) + bias for n in range(9)], 1)
    torch.testing.assert_close(causal_filter(x, weight, bias), expected)
    weight, bias = torch.randn(9, 1, taps), torch.randn(9)
    expected = causal_filter(x.transpose(1, 2), weight, bias).transpose(1, 2)
    torch.testing.assert_close(causal_channel_filter(x, weight, bias), expected)


@pytest.mark.parametrize("name", ["hyena_se", "hyena_x", "hyena_y", "mamba2"])
def test_no_token_sees_a_later_one(name: str) -> None:
    module = small(name, num_tokens=90)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # the inner filter starts at the identity
    x = torch.randn(1, 90, DIM, requires_grad=True)
    module(x)[0, 70].sum().backward()
    assert x.grad is not None
    touched = x.grad[0].abs().sum(-1)
    assert touched[71:].abs().sum() == 0
    assert touched[70] > 0
    assert touched[68] > 0


def test_hyena_filters_start_at_the_identity() -> None:
    module = small("hyena_se")
    x = torch.randn(2, TOKENS, DIM)
    assert torch.equal(module.inner_filter(x), x)
    assert module.inner_filter.weight[:, 0].tolist() == [[0.0, 0.0, 0.0, 1.0]] * DIM


def test_mlp_hyena_x_refuses_another_number_of_tokens() -> None:
    module = small("mlp_hyena_x")
    with pytest.raises(OperatorError, match=f"each of {TOKENS} tokens and got 20; build it for that number"):
        module(torch.randn(1, 20, DIM))
    with pytest.raises(OperatorError, match="got 20"):
        operators.cost_of(module, 20, DIM)


# --- Mamba-2 ------------------------------------------------------------------------------------------------


def recurrent_ssd(x: Tensor, dt: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Token by token, as the state space model is defined."""
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[-1])
    outputs = []
    for n in range(x.shape[1]):
        added = torch.einsum("bh,bhp,bs->bhps", dt[:, n], x[:, n], b[:, n])
        state = log_decay[:, n].exp()[..., None, None] * state + added
        outputs.append(torch.einsum("bhps,bs->bhp", state, c[:, n]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(
    ("num_tokens", "chunk"), [(1, 4), (7, 64), (64, 64), (65, 64), (100, 3), (300, 1), (90, 8)]
)
def test_chunked_mamba_is_the_recurrence(num_tokens: int, chunk: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, num_tokens, 3, 4, dtype=torch.float64, requires_grad=True)
    dt = torch.rand(2, num_tokens, 3, dtype=torch.float64)
    log_decay = -dt * torch.tensor([0.01, 0.5, 16.0], dtype=torch.float64)
    b, c = torch.randn(2, 2, num_tokens, 5, dtype=torch.float64)
    y, expected = ssd(x, dt, log_decay, b, c, chunk), recurrent_ssd(x, dt, log_decay, b, c)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    mine, reference = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 300])
def test_states_are_carried_over_chunks(count: int) -> None:
    torch.manual_seed(0)
    log_decay, added = -torch.rand(2, count, 3), torch.randn(2, count, 3, 4, 5)
    state, expected = torch.zeros(2, 3, 4, 5), []
    for n in range(count):
        expected.append(state)
        state = log_decay[:, n].exp()[..., None, None] * state + added[:, n]
    torch.testing.assert_close(
        carried_states(log_decay, added), torch.stack(expected, 1), rtol=1e-4, atol=1e-4
    )


def test_chunk_size_does_not_change_mamba() -> None:
    x = torch.randn(2, 50, DIM)
    outputs = [small("mamba2", chunk_size=size)(x) for size in (1, 7, 64)]
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-4, atol=1e-5)


def test_mamba_starts_with_the_usual_decays() -> None:
    module = operators.build("mamba2", dim=512)
    dt, rate = F.softplus(module.dt_bias), module.A_log.exp()
    assert 0.999e-3 < dt.min() < 3e-3
    assert 3e-2 < dt.max() < 0.1001
    assert 1.0 <= rate.min() < 2.5
    assert 14.0 < rate.max() <= 16.001


# --- MLP ----------------------------------------------------------------------------------------------------


def donor_output(donor: operators.MLPDonor, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, donor.in_weight, donor.in_bias), approximate="tanh")
    return F.linear(hidden, donor.out_weight, donor.out_bias)


@pytest.mark.parametrize("ratio", [4, 4.0, 4.5, 6])
def test_mlp_at_least_as_wide_as_its_donor_is_its_donor(ratio: float) -> None:
    module, donor = small("mlp", ratio=ratio), mlp_donor()
    operators.copy_donor(module, donor)
    x = torch.randn(2, TOKENS, DIM)
    torch.testing.assert_close(module(x), donor_output(donor, x), rtol=1e-5, atol=1e-5)
    assert torch.all(module.fc2.weight[:, 4 * DIM :] == 0)
    assert torch.all(module.fc1.weight[4 * DIM :].abs().sum(1) > 0)


def test_narrow_mlp_keeps_the_useful_units() -> None:
    donor = mlp_donor()
    donor.out_weight[:, ::2] *= 1e-6
    module = small("mlp", ratio=2)
    operators.copy_donor(module, donor)
    x = torch.randn(2, TOKENS, DIM)
    torch.testing.assert_close(module(x), donor_output(donor, x), rtol=1e-3, atol=1e-3)

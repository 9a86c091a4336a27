"""Hyena's featurizer, inner filter and gates in one pass over memory forward and one backward (Triton).

y[n] = q[n] h[n] with h = inner(k v) and q, k, v = featurizer(u); either filter may be absent. Tokens are rows and
channels are contiguous: a filter's taps are earlier rows of the same columns, nothing is transposed. Backward computes
the filters again instead of storing them. Sums are in fp32; a parameter's gradient is summed in a fixed order.
Axes: B batch, N tokens, D width, K taps. Imported only where Triton is.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
# ruff: noqa: RUF005 - tuples grow by concatenation in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# (tokens, channels) of a tile: few values a thread, so that the compiler keeps all rows that a tile needs in registers
# (bf16, K = 4, compiled for sm_90: 77 and 196 registers, none spilled).
FORWARD_TILE, BACKWARD_TILE, NUM_WARPS = (8, 128), (4, 64), 4
TOKENS_PER_PROGRAM = 256  # backward: of one sample, whose part of a filter's gradient is summed in registers


@triton.jit
def _rows(base, tokens, channels, valid, num_tokens, stride):
    """Rows `tokens` of one sample at some columns in fp32, zero outside: [TOKENS, CHANNELS]."""
    inside = ((tokens >= 0) & (tokens < num_tokens))[:, None] & valid[None, :]
    return tl.load(base + tokens[:, None] * stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tap(taps, width, channels, valid, tap: tl.constexpr):
    """One tap of filters [K, C]: [1, CHANNELS]."""
    return tl.load(taps + tap * width + channels, mask=valid, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _featurized(
    base, weight, bias, tokens, channels, valid, num_tokens, stride, TAPS: tl.constexpr, HAS: tl.constexpr
):
    """q, k or v at `tokens`."""
    if HAS:
        y = tl.load(bias + channels, mask=valid, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(TAPS):
            row = _rows(base, tokens - (TAPS - 1) + tap, channels, valid, num_tokens, stride)
            y = y + row * _tap(weight, stride, channels, valid, tap)
    else:
        y = _rows(base, tokens, channels, valid, num_tokens, stride)
    return y


@triton.jit
def _product(
    base, weight, bias, tokens, column, valid, num_tokens, dim, TAPS: tl.constexpr, FEATURIZER: tl.constexpr
):
    """k v at `tokens`, zero before the first."""
    k = _featurized(base, weight, bias, tokens, dim + column, valid, num_tokens, 3 * dim, TAPS, FEATURIZER)
    v = _featurized(
        base, weight, bias, tokens, 2 * dim + column, valid, num_tokens, 3 * dim, TAPS, FEATURIZER
    )
    return tl.where((tokens >= 0)[:, None], k * v, 0.0)


@triton.jit
def _mixed(
    base, weight, bias, inner, shift, tokens, column, valid, num_tokens, dim,
    TAPS: tl.constexpr, FEATURIZER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """inner(k v) at `tokens`."""
    if INNER:
        h = tl.load(shift + column, mask=valid, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(TAPS):
            p = _product(
                base,
                weight,
                bias,
                tokens - (TAPS - 1) + tap,
                column,
                valid,
                num_tokens,
                dim,
                TAPS,
                FEATURIZER,
            )
            h = h + p * _tap(inner, dim, column, valid, tap)
    else:
        h = _product(base, weight, bias, tokens, column, valid, num_tokens, dim, TAPS, FEATURIZER)
    return h


@triton.jit
def _forward(
    u, weight, bias, inner, shift, y, num_tokens, dim,
    TAPS: tl.constexpr, FEATURIZER: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    sample = tl.program_id(2).to(tl.int64)
    valid = column < dim
    base = u + sample * num_tokens * 3 * dim
    q = _featurized(base, weight, bias, tokens, column, valid, num_tokens, 3 * dim, TAPS, FEATURIZER)
    h = _mixed(
        base, weight, bias, inner, shift, tokens, column, valid, num_tokens, dim, TAPS, FEATURIZER, INNER
    )
    place = y + sample * num_tokens * dim + tokens[:, None] * dim + column[None, :]
    tl.store(place, q * h, mask=(tokens < num_tokens)[:, None] & valid[None, :])


@triton.jit
def _at(
    base, gradient, weight, bias, inner, shift, tokens, column, valid, num_tokens, dim,
    TAPS: tl.constexpr, FEATURIZER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v at `tokens`, and of h: zero from `num_tokens` on."""
    g = _rows(gradient, tokens, column, valid, num_tokens, dim)
    q = _featurized(base, weight, bias, tokens, column, valid, num_tokens, 3 * dim, TAPS, FEATURIZER)
    k = _featurized(base, weight, bias, tokens, dim + column, valid, num_tokens, 3 * dim, TAPS, FEATURIZER)
    v = _featurized(
        base, weight, bias, tokens, 2 * dim + column, valid, num_tokens, 3 * dim, TAPS, FEATURIZER
    )
    h = _mixed(
        base, weight, bias, inner, shift, tokens, column, valid, num_tokens, dim, TAPS, FEATURIZER, INNER
    )
    dh = g * q
    if INNER:
        dp = tl.zeros_like(g)
        for ahead in tl.static_range(TAPS):
            later = tokens + ahead
            g_later = _rows(gradient, later, column, valid, num_tokens, dim)
            q_later = _featurized(
                base, weight, bias, later, column, valid, num_tokens, 3 * dim, TAPS, FEATURIZER
            )
            dp = dp + g_later * q_later * _tap(inner, dim, column, valid, TAPS - 1 - ahead)
        dp = tl.where((tokens < num_tokens)[:, None], dp, 0.0)
    else:
        dp = dh
    return g * h, dp * v, dp * k, dh


@triton.jit
def _backward(
    u, weight, bias, inner, shift, gradient, grad_u, sums, num_tokens, dim, tokens_per_program,
    TAPS: tl.constexpr, FEATURIZER: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`sums` [programs of a column, filters, K + 1, D]: this program's part of the gradients of q, k, v, inner."""
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(2).to(tl.int64)
    valid = column < dim
    base = u + sample * num_tokens * 3 * dim
    given = gradient + sample * num_tokens * dim
    REACH: tl.constexpr = TAPS if FEATURIZER else 1  # a token's gradient comes from itself and the next K - 1
    ROWS: tl.constexpr = ((3 if FEATURIZER else 0) + (1 if INNER else 0)) * (TAPS + 1)
    zero = tl.zeros((TOKENS, CHANNELS), tl.float32)
    found = ()
    for _ in tl.static_range(ROWS):
        found = found + (zero,)
    start = tl.program_id(1) * tokens_per_program
    for first in range(start, min(start + tokens_per_program, num_tokens), TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        back = (zero, zero, zero)
        new = ()
        for ahead in tl.static_range(REACH):
            dq, dk, dv, dh = _at(
                base, given, weight, bias, inner, shift, tokens + ahead, column, valid, num_tokens, dim,
                TAPS, FEATURIZER, INNER,
            )  # fmt: skip
            own = (dq, dk, dv)
            if ahead == 0:
                if FEATURIZER:
                    for part in tl.static_range(3):
                        for tap in tl.static_range(TAPS):
                            row = _rows(
                                base,
                                tokens - (TAPS - 1) + tap,
                                part * dim + column,
                                valid,
                                num_tokens,
                                3 * dim,
                            )
                            new = new + (found[part * (TAPS + 1) + tap] + own[part] * row,)
                        new = new + (found[part * (TAPS + 1) + TAPS] + own[part],)
                if INNER:
                    for tap in tl.static_range(TAPS):
                        p = _product(
                            base, weight, bias, tokens - (TAPS - 1) + tap, column, valid, num_tokens, dim,
                            TAPS, FEATURIZER,
                        )  # fmt: skip
                        new = new + (found[ROWS - TAPS - 1 + tap] + dh * p,)
                    new = new + (found[ROWS - 1] + dh,)
            if FEATURIZER:
                back = (
                    back[0] + dq * _tap(weight, 3 * dim, column, valid, TAPS - 1 - ahead),
                    back[1] + dk * _tap(weight, 3 * dim, dim + column, valid, TAPS - 1 - ahead),
                    back[2] + dv * _tap(weight, 3 * dim, 2 * dim + column, valid, TAPS - 1 - ahead),
                )
            else:
                back = own
        found = new
        inside = (tokens < num_tokens)[:, None] & valid[None, :]
        place = grad_u + sample * num_tokens * 3 * dim + tokens[:, None] * (3 * dim) + column[None, :]
        for part in tl.static_range(3):
            tl.store(place + part * dim, back[part], mask=inside)
    place_of_sums = sums + (sample * tl.num_programs(1) + tl.program_id(1)) * ROWS * dim + column
    for number in tl.static_range(ROWS):
        tl.store(place_of_sums + number * dim, tl.sum(found[number], 0), mask=valid)


def _num_taps(weight: Tensor | None, inner: Tensor | None) -> int:
    given = weight if weight is not None else inner
    return 1 if given is None else given.shape[-1]


def _taps_first(weight: Tensor | None) -> Tensor | None:
    """[C, 1, K] as `nn.Conv1d` stores it -> [K, C], so that a tap's channels are read together."""
    return None if weight is None else weight[:, 0].T.contiguous()


def forward(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, inner: Tensor | None, shift: Tensor | None
) -> Tensor:
    """u [B, N, 3D], featurizer [3D, 1, K] and [3D], inner filter [D, 1, K] and [D] -> [B, N, D]."""
    batch, num_tokens, width = u.shape
    dim = width // 3
    y = u.new_empty(batch, num_tokens, dim)
    if y.numel() == 0:
        return y
    tokens, channels = FORWARD_TILE
    _forward[triton.cdiv(dim, channels), triton.cdiv(num_tokens, tokens), batch](
        u, _taps_first(weight), bias, _taps_first(inner), shift, y, num_tokens, dim, TAPS=_num_taps(weight, inner),
        FEATURIZER=weight is not None, INNER=inner is not None, TOKENS=tokens, CHANNELS=channels, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def backward(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, inner: Tensor | None, shift: Tensor | None,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of u, and those of the filters in fp32: [filters (q, k, v, inner), K + 1, D], biases last."""
    batch, num_tokens, width = u.shape
    dim, taps = width // 3, _num_taps(weight, inner)
    grad_u = torch.empty_like(u)
    chunks = triton.cdiv(num_tokens, TOKENS_PER_PROGRAM)
    filters = 3 * (weight is not None) + (inner is not None)
    sums = u.new_empty(batch * chunks, filters, taps + 1, dim, dtype=torch.float32)
    if u.numel():
        tokens, channels = BACKWARD_TILE
        _backward[triton.cdiv(dim, channels), chunks, batch](
            u, _taps_first(weight), bias, _taps_first(inner), shift, gradient, grad_u, sums, num_tokens, dim,
            TOKENS_PER_PROGRAM, TAPS=taps, FEATURIZER=weight is not None, INNER=inner is not None, TOKENS=tokens,
            CHANNELS=channels, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_u, sums.sum(0)

"""q * k * v of a causally filtered projection, on CPUs: a few samples at a time, so that passes stay in the cache.

The plain path reads and writes the whole [B, N, 3D] tensor about a dozen times, forward and backward; here every
pass but the first goes over a piece of it. Backward recomputes the filter instead of storing its output.
Axes: B batch, N tokens, D width, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_BYTES = 1 << 19  # of one [b, N, 3D] piece: a fraction of a core's second-level cache


def available(u: Tensor) -> bool:
    """Whether this path is for such a tensor."""
    return u.device.type == "cpu" and u.is_floating_point() and not torch.compiler.is_compiling()


def gated_filter(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """u [B, N, 3D], weight [3D, 1, K], bias [3D] -> q * k * v [B, N, D] with q, k, v = causal filter of u."""
    return _GatedFilter.apply(u, weight, bias)


def _pieces(u: Tensor) -> Iterator[tuple[slice, int, int]]:
    """(samples, first token, last token + 1): whole samples while they are small, else runs of tokens of one."""
    batch, num_tokens, channels = u.shape
    row, size = channels * max(4, u.element_size()), PIECE_BYTES
    if type(u) not in (
        Tensor,
        torch.nn.Parameter,
    ):  # a stand-in without values: few pieces tell as much as many
        size = max(size, batch * num_tokens * row // 8)
    samples = max(1, size // max(1, num_tokens * row))
    tokens = num_tokens if samples > 1 else max(1, size // row)
    for start in range(0, batch, samples):
        for first in range(0, num_tokens, tokens):
            yield slice(start, start + samples), first, min(first + tokens, num_tokens)


def _with_past(u: Tensor, samples: slice, first: int, stop: int, past: int, compute: torch.dtype) -> Tensor:
    """Tokens first - past .. stop of some samples, zeros before the start: [b, past + stop - first, C]."""
    begin = max(0, first - past)
    piece = u[samples, begin:stop].to(compute)
    missing = past - (first - begin)
    return F.pad(piece, (0, 0, missing, 0)) if missing else piece


def _filter(padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """padded [b, n + K - 1, C], weight [K, C], bias [C] -> [b, n, C]."""
    count = padded.shape[1] - len(weight) + 1
    y = torch.addcmul(bias, padded[:, :count], weight[0])
    for tap in range(1, len(weight)):
        y.addcmul_(padded[:, tap : tap + count], weight[tap])
    return y


class _GatedFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        compute = torch.promote_types(u.dtype, torch.float32)
        taps, shift = weight[:, 0].T.to(compute).contiguous(), bias.to(compute)
        result = u.new_empty(*u.shape[:2], u.shape[2] // 3)
        for samples, first, stop in _pieces(u):
            padded = _with_past(u, samples, first, stop, len(taps) - 1, compute)
            q, k, v = _filter(padded, taps, shift).chunk(3, dim=-1)
            result[samples, first:stop] = q * k * v
        ctx.save_for_backward(u, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, weight, bias = ctx.saved_tensors
        compute = torch.promote_types(u.dtype, torch.float32)
        taps, shift = weight[:, 0].T.to(compute).contiguous(), bias.to(compute)
        num_tokens, width, past = u.shape[1], u.shape[2] // 3, weight.shape[-1] - 1
        grad_u, grad_taps, grad_shift = torch.empty_like(u), torch.zeros_like(taps), torch.zeros_like(shift)
        for samples, first, stop in _pieces(u):
            ahead = min(stop + past, num_tokens)  # a token's gradient comes from itself and the next K - 1
            padded = _with_past(u, samples, first, ahead, past, compute)
            q, k, v = _filter(padded, taps, shift).chunk(3, dim=-1)
            g = gradient[samples, first:ahead].to(compute)
            count, here = stop - first, ahead - first
            grown = padded.new_empty(
                len(padded), count + past, 3 * width
            )  # gradients of the filtered projection
            grown[:, here:] = 0
            gk = g * k
            torch.mul(gk, v, out=grown[:, :here, :width])
            torch.mul(g * q, v, out=grown[:, :here, width : 2 * width])
            torch.mul(gk, q, out=grown[:, :here, 2 * width :])
            own = grown[:, :count]
            back = own * taps[-1]
            for tap in range(past):
                back.addcmul_(grown[:, past - tap : past - tap + count], taps[tap])
            grad_u[samples, first:stop] = back
            for tap in range(past + 1):
                grad_taps[tap] += (own * padded[:, tap : tap + count]).sum((0, 1))
            grad_shift += own.sum((0, 1))
        return grad_u, grad_taps.T.unsqueeze(1).to(weight.dtype), grad_shift.to(bias.dtype)

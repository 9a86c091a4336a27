"""Causal filters, and the product q * k * v of a filtered projection, on CPUs: passes that stay in the cache.

The plain path reads and writes the whole tensor about a dozen times, forward and backward; here every pass but the
first goes over a piece of it, a few samples at a time. Backward recomputes the filter instead of storing its output;
it can't be differentiated again.
Axes: B batch, N tokens, C channels, D width (C = 3D of a projection), K taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from grafting.kernels import pieces


def filtered(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, N, C], weight [C, 1, K], bias [C] -> the causal filter of x, [B, N, C]."""
    return _Filter.apply(x, weight, bias)


def filtered_along_channels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, N, C], weight [N, 1, K], bias [N] -> the causal filter of x along C, one for each token: [B, N, C]."""
    return _ChannelFilter.apply(x, weight, bias)


def gated_filter(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """u [B, N, 3D], weight [3D, 1, K], bias [3D] -> q * k * v [B, N, D] with q, k, v = causal filter of u."""
    return _GatedFilter.apply(u, weight, bias)


def _pieces(u: Tensor) -> Iterator[tuple[slice, int, int]]:
    """(samples, first token, last token + 1): whole samples while they are small, else runs of tokens of one."""
    batch, num_tokens, channels = u.shape
    row = channels * max(4, u.element_size())
    size = pieces.size_of(u, batch * num_tokens * row)
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


def _taps(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[C, 1, K] and [C] as they are computed with, in fp32 at least: [K, C] and [C]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return weight[:, 0].T.to(compute).contiguous(), bias.to(compute)


def _correlate(gradient: Tensor, taps: Tensor, count: int) -> Tensor:
    """Gradients of outputs [b, count + K - 1, C] -> of inputs, each by its own and the next K - 1: [b, count, C]."""
    past = len(taps) - 1
    back = gradient[:, :count] * taps[-1]
    for tap in range(past):
        back.addcmul_(gradient[:, past - tap : past - tap + count], taps[tap])
    return back


class _Sums:
    """Gradients of taps [K, C] and bias [C], piece by piece."""

    def __init__(self, taps: Tensor, bias: Tensor) -> None:
        self.taps, self.bias = torch.zeros_like(taps), torch.zeros_like(bias)

    def add(self, own: Tensor, padded: Tensor) -> None:
        """own [b, n, C]: gradients of outputs; padded [b, >= K - 1 + n, C]: the inputs that they saw."""
        for tap, total in enumerate(self.taps):
            total += (own * padded[:, tap : tap + own.shape[1]]).sum((0, 1))
        self.bias += own.sum((0, 1))

    def like(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.taps.T.unsqueeze(1).to(weight.dtype), self.bias.to(bias.dtype)


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps, shift = _taps(x, weight, bias)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        for samples, first, stop in _pieces(x):
            result[samples, first:stop] = _filter(
                _with_past(x, samples, first, stop, len(taps) - 1, taps.dtype), taps, shift
            )
        ctx.save_for_backward(x, weight, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        taps, shift = _taps(x, weight, bias)
        past, sums = len(taps) - 1, _Sums(taps, shift)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        for samples, first, stop in _pieces(x):
            count = stop - first
            grown = gradient[samples, first : min(stop + past, x.shape[1])].to(taps.dtype)
            if missing := count + past - grown.shape[1]:
                grown = F.pad(grown, (0, 0, 0, missing))
            grad_x[samples, first:stop] = _correlate(grown, taps, count)
            sums.add(grown[:, :count], _with_past(x, samples, first, stop, past, taps.dtype))
        return grad_x, *sums.like(weight, bias)


class _ChannelFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        taps, shift = weight.to(compute), bias.to(compute)  # [N, 1, K], [N]
        width, past = x.shape[2], weight.shape[-1] - 1
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        for samples, first, stop in _pieces(x):
            padded, own = F.pad(x[samples, first:stop].to(compute), (past, 0)), taps[first:stop]
            y = torch.addcmul(shift[first:stop, None], padded[..., :width], own[..., 0])
            for tap in range(1, past + 1):
                y.addcmul_(padded[..., tap : tap + width], own[..., tap])
            result[samples, first:stop] = y
        ctx.save_for_backward(x, weight, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        compute = torch.promote_types(x.dtype, torch.float32)
        taps = weight.to(compute)
        width, past = x.shape[2], weight.shape[-1] - 1
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_taps, grad_shift = torch.zeros_like(taps), torch.zeros_like(bias, dtype=compute)
        for samples, first, stop in _pieces(x):
            padded, own = F.pad(x[samples, first:stop].to(compute), (past, 0)), taps[first:stop]
            grown = F.pad(gradient[samples, first:stop].to(compute), (0, past))
            g = grown[..., :width]
            back = g * own[..., past]
            for tap in range(past):
                back.addcmul_(grown[..., past - tap : past - tap + width], own[..., tap])
            grad_x[samples, first:stop] = back
            for tap in range(past + 1):
                grad_taps[first:stop, 0, tap] += (g * padded[..., tap : tap + width]).sum((0, 2))
            grad_shift[first:stop] += g.sum((0, 2))
        return grad_x, grad_taps.to(weight.dtype), grad_shift.to(bias.dtype)


class _GatedFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps, shift = _taps(u, weight, bias)
        result = u.new_empty(*u.shape[:2], u.shape[2] // 3)
        for samples, first, stop in _pieces(u):
            padded = _with_past(u, samples, first, stop, len(taps) - 1, taps.dtype)
            q, k, v = _filter(padded, taps, shift).chunk(3, dim=-1)
            result[samples, first:stop] = q * k * v
        ctx.save_for_backward(u, weight, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, weight, bias = ctx.saved_tensors
        taps, shift = _taps(u, weight, bias)
        num_tokens, width, past = u.shape[1], u.shape[2] // 3, weight.shape[-1] - 1
        grad_u, sums = torch.empty_like(u), _Sums(taps, shift)
        for samples, first, stop in _pieces(u):
            ahead = min(stop + past, num_tokens)  # a token's gradient comes from itself and the next K - 1
            padded = _with_past(u, samples, first, ahead, past, taps.dtype)
            q, k, v = _filter(padded, taps, shift).chunk(3, dim=-1)
            g = gradient[samples, first:ahead].to(taps.dtype)
            count, here = stop - first, ahead - first
            grown = padded.new_empty(
                len(padded), count + past, 3 * width
            )  # gradients of the filtered projection
            grown[:, here:] = 0
            gk = g * k
            torch.mul(gk, v, out=grown[:, :here, :width])
            torch.mul(g * q, v, out=grown[:, :here, width : 2 * width])
            torch.mul(gk, q, out=grown[:, :here, 2 * width :])
            grad_u[samples, first:stop] = _correlate(grown, taps, count)
            sums.add(grown[:, :count], padded)
        return grad_u, *sums.like(weight, bias)

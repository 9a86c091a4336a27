"""Products with scores that decay with distance, on CPUs: a few matrices at a time, so that passes stay in the cache.

The plain path makes and keeps the decays and the weights of all heads, [M, H, l, l] in fp32; here a piece of them lives
at a time, and backward makes it again; it can't be differentiated a second time.
Axes: M chunks of all samples, H heads, P head width, l tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grafting.kernels import pieces


def decayed_product(total: Tensor, scores: Tensor, x: Tensor) -> Tensor:
    """y[i] = sum of exp(total[i] - total[j]) scores[i, j] x[j] over j <= i, per head.

    total [M, l, H]: running sums of log decays, which are at most 0, in fp32; scores [M, l, l] shared by the heads;
    x [M, l, H, P] -> as x.
    """
    return _DecayedProduct.apply(total, scores, x)


def _pieces(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """(chunks, heads): all heads of some chunks while they are small, else some heads of one."""
    count, tokens, heads, _ = x.shape
    matrix = 4 * tokens * tokens  # in fp32
    size = pieces.size_of(x, count * heads * matrix)
    chunks = max(1, size // (heads * matrix))
    some = heads if chunks > 1 else max(1, size // matrix)
    for start in range(0, count, chunks):
        for first in range(0, heads, some):
            yield slice(start, start + chunks), slice(first, first + some)


def _decays(total: Tensor) -> Tensor:
    """total [m, l, h] -> [m, h, l, l]: exp(total[i] - total[j]) for j <= i, something in (0, 1] above the diagonal.

    Not exp(-inf) there, which takes ten times as long.
    """
    sums = total.transpose(1, 2).contiguous()
    return (sums[..., :, None] - sums[..., None, :]).clamp_(max=0).exp_()


class _DecayedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, scores: Tensor, x: Tensor) -> Tensor:
        past, y = scores.tril().to(total.dtype), torch.empty_like(x, memory_format=torch.contiguous_format)
        for chunks, heads in _pieces(x):
            weights = _decays(total[chunks, :, heads]).mul_(past[chunks, None])
            values = x[chunks, :, heads].transpose(1, 2)  # [m, h, l, P]
            y[chunks, :, heads] = (weights.to(x.dtype) @ values).transpose(1, 2)
        ctx.save_for_backward(total, scores, x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, scores, x = ctx.saved_tensors
        past = scores.tril().to(total.dtype)
        grad_total, grad_x = torch.empty_like(total), torch.empty_like(x)
        grad_scores = torch.zeros_like(scores, dtype=total.dtype)
        for chunks, heads in _pieces(x):
            decays = _decays(total[chunks, :, heads])
            weights = decays * past[chunks, None]
            values, g = (t[chunks, :, heads].transpose(1, 2) for t in (x, gradient))
            grad_x[chunks, :, heads] = (weights.to(x.dtype).transpose(-1, -2) @ g).transpose(1, 2)
            grad_weights = (g @ values.transpose(-1, -2)).to(total.dtype)
            grad_scores[chunks] += decays.mul_(grad_weights).sum(1)
            along = weights.mul_(grad_weights)
            grad_total[chunks, :, heads] = (along.sum(-1) - along.sum(-2)).transpose(1, 2)
        return grad_total, grad_scores.tril_().to(scores.dtype), grad_x

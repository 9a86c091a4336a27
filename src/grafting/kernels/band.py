"""Attention over a window of neighbours by FlexAttention on CUDA; blocks outside of the band are never visited.

Axes: B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens on a side of FlexAttention's blocks
MIN_WIDTH = 16  # of a head, for FlexAttention's kernels


def available(q: Tensor) -> bool:
    """Whether `attention` is for queries like these: on CUDA, after its numbers were found right there."""
    if q.device.type != "cuda" or q.shape[2] <= BLOCK or q.shape[3] < MIN_WIDTH:
        return False
    real = torch.compiler.is_compiling() or type(q) in (Tensor, torch.nn.Parameter)
    if not real:
        return False
    from grafting.kernels import trusted

    return trusted.band_is(q.device, q.dtype, q.shape[3])


def attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of every token over the tokens at most `window` away: q, k, v [B, H, N, d] -> [B, H, N, d]."""
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=make_block_mask(q.shape[2], window, q.device))
    return _compiled()(q, k, v, block_mask=block_mask(q.shape[2], window, q.device))


def make_block_mask(num_tokens: int, window: int, device: torch.device) -> BlockMask:
    """The band |i - j| <= window as blocks, made without the N x N mask."""
    from torch.nn.attention.flex_attention import BlockMask

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= window

    count, reach = -(-num_tokens // BLOCK), -(-window // BLOCK)
    row = torch.arange(count, device=device)
    first, last = (row - reach).clamp_min(0), (row + reach).clamp_max(count - 1)
    columns = (first[:, None] + row[None, :]).clamp_max(
        count - 1
    )  # beyond the row's number they are not read
    return BlockMask.from_kv_blocks(
        (last - first + 1).to(torch.int32)[None, None], columns.to(torch.int32)[None, None],
        BLOCK_SIZE=BLOCK, mask_mod=near, seq_lengths=(num_tokens, num_tokens),
    )  # fmt: skip


block_mask = cache(make_block_mask)


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)

"""The state space recurrence of Mamba-2 in chunks (arXiv 2405.21060, section 6): no loop over tokens.

Axes: B batch, N tokens, H heads, P head width, S state size, c chunks, l and s tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grafting.kernels import decayed, pieces

# How many chunks (or groups of chunks, and so on) one step of the recursion over chunks combines.
FAN_IN = 16


def _span_sums(steps: Tensor) -> Tensor:
    """[..., n] -> [..., n, n]: entry (i, j) is the sum of steps j + 1 .. i, -inf above the diagonal."""
    size = steps.shape[-1]
    total = steps.cumsum(-1)
    sums = total[..., :, None] - total[..., None, :]
    lower = torch.ones(size, size, dtype=torch.bool, device=steps.device).tril()
    return sums.masked_fill(~lower, float("-inf"))


def carried_states(log_decay: Tensor, added: Tensor) -> Tensor:
    """The state that enters each of n chunks: h[0] = 0, h[i + 1] = exp(log_decay[i]) h[i] + added[i].

    log_decay [B, n, H], added [B, n, H, P, S] -> [B, n, H, P, S]. Groups of `FAN_IN` are summed by one
    matrix each and their totals carried by recursion, so memory is linear in n and depth logarithmic.
    """
    batch, count, heads = log_decay.shape
    if count == 1:
        return torch.zeros_like(added)
    size = min(FAN_IN, count)
    groups = -(-count // size)
    missing = groups * size - count
    log_decay = F.pad(log_decay, (0, 0, 0, missing)).view(batch, groups, size, heads)
    added = F.pad(added, (0, 0, 0, 0, 0, 0, 0, missing)).view(batch, groups, size, heads, *added.shape[-2:])
    # Within a group: h[i] gets added[j], j < i, through the decays of j + 1 .. i - 1; row i of `spans`
    # holds that for the state that leaves element i.
    spans = torch.exp(_span_sums(log_decay.transpose(2, 3)))  # [B, g, H, size, size]
    leaving = torch.einsum("bghij,bgjhps->bgihps", spans.to(added.dtype), added)
    entering = F.pad(leaving, (0, 0, 0, 0, 0, 0, 1, 0))[:, :, :size]
    if groups > 1:
        into_group = carried_states(log_decay.sum(2), leaving[:, :, -1])  # [B, g, H, P, S]
        before = log_decay.cumsum(2) - log_decay  # decay from the group's start to element i
        entering = entering + torch.exp(before)[..., None, None].to(added.dtype) * into_group[:, :, None]
    return entering.flatten(1, 2)[:, :count]


def ssd(x: Tensor, dt: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> Tensor:
    """y[t] = c[t] . h[t] with h[t] = exp(log_decay[t]) h[t - 1] + dt[t] b[t] x[t]^T, per head.

    x [B, N, H, P], dt and log_decay [B, N, H] in fp32, the latter at most 0, b and c [B, N, S] shared by the heads ->
    [B, N, H, P].
    Decays are formed in fp32, products in the type of x; memory is O(N H (chunk_size + P S / chunk_size)).
    """
    batch, num_tokens, heads, width = x.shape
    size = min(chunk_size, num_tokens)
    chunks = -(-num_tokens // size)
    missing = chunks * size - num_tokens

    def in_chunks(
        t: Tensor,
    ) -> Tensor:  # [B, N, ...] -> [B, c, l, ...]; padding tokens have dt = 0: no effect
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)).view(batch, chunks, size, *t.shape[2:])

    steps = in_chunks(log_decay)  # [B, c, l, H]
    total = steps.cumsum(2)
    x_in = in_chunks(x * dt[..., None].to(x.dtype))  # [B, c, l, H, P]
    b, c = in_chunks(b), in_chunks(c)  # [B, c, l, S]

    scores = c @ b.transpose(-1, -2)  # [B, c, l, s]
    if pieces.available(x):
        within = decayed.decayed_product(total.flatten(0, 1), scores.flatten(0, 1), x_in.flatten(0, 1))
        y = within.view_as(x_in).transpose(2, 3)  # [B, c, H, l, P]
    else:
        decays = torch.exp(_span_sums(steps.transpose(2, 3)))  # [B, c, H, l, s]
        y = (scores[:, :, None] * decays.to(scores.dtype)) @ x_in.transpose(2, 3)
    if chunks > 1:
        to_end = torch.exp(total[:, :, -1:] - total)  # [B, c, l, H]
        kept = (x_in * to_end[..., None].to(x.dtype)).permute(0, 1, 3, 4, 2)  # [B, c, H, P, l]
        added = kept @ b[:, :, None]  # [B, c, H, P, S]
        exact = torch.promote_types(added.dtype, torch.float32)
        state = carried_states(total[:, :, -1], added.to(exact)).to(x.dtype)
        carried = c[:, :, None] @ state.transpose(-1, -2)  # [B, c, H, l, P]
        y = y + carried * torch.exp(total).transpose(2, 3)[..., None].to(x.dtype)
    return y.transpose(2, 3).reshape(batch, chunks * size, heads, width)[:, :num_tokens]

"""Softmax attention over all tokens (`mha`) or over a window of neighbours (`swa`)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from grafting.errors import OperatorError
from grafting.kernels import band
from grafting.operators.base import AttentionDonor, Cost, Donor, Operator, assign, linear, num_params
from grafting.operators.registry import register

SHORT = 128  # keys; below, the fused kernel's overhead on CPUs outweighs what it saves


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3D] -> three times [B, H, N, D / H]."""
    batch, num_tokens, width = qkv.shape
    q, k, v = qkv.view(batch, num_tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that `mask` allows: q, k, v [B, H, N, d] -> [B, H, N, d].

    PyTorch's fused attention, but for short sequences on CPUs: there two matrix products are 3.8 times as fast in bf16,
    forward and backward (64 tokens, 4 heads of 32). In fp32 they take up to twice as long forward, and give the same
    bits with and without gradients and for any split of a batch, as the fused one does not.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    short = q.device.type == "cpu" and k.shape[2] <= SHORT
    if not short or (q.dtype == torch.bfloat16 and not training):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype), v)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of every token over the tokens at most `window` away, on both sides.

    q, k, v [B, H, N, d] -> [B, H, N, d]; time and memory are linear in N.
    """
    if window >= q.shape[2] - 1:
        return softmax_attention(q, k, v)
    if band.available(q):
        return band.attention(q, k, v, window)
    return blocked_window_attention(q, k, v, window)


def blocked_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The same with queries in blocks: a block sees its own keys and `window` on either side."""
    batch, heads, num_tokens, width = q.shape
    block = max(16, 2 * window)
    num_blocks = -(-num_tokens // block)
    padding = num_blocks * block - num_tokens

    def blocks_of_keys(t: Tensor) -> Tensor:  # [B, H, N, d] -> [B, blocks, H, block + 2w, d]
        padded = F.pad(t, (0, 0, window, window + padding))
        return padded.unfold(2, block + 2 * window, block).permute(0, 2, 1, 4, 3)

    q = F.pad(q, (0, 0, 0, padding)).view(batch, heads, num_blocks, block, width).transpose(1, 2)
    queries = torch.arange(num_blocks * block, device=q.device).view(num_blocks, block, 1)
    offsets = torch.arange(block + 2 * window, device=q.device)
    keys = (torch.arange(num_blocks, device=q.device) * block - window)[:, None, None] + offsets
    # A padding query sees padding keys, so that no row of the softmax is empty.
    allowed = (keys - queries).abs() <= window
    allowed &= ((keys >= 0) & (keys < num_tokens)) | (queries >= num_tokens)
    y = softmax_attention(
        q.flatten(0, 1),
        blocks_of_keys(k).flatten(0, 1),
        blocks_of_keys(v).flatten(0, 1),
        mask=allowed[:, None].repeat(batch, 1, 1, 1),
    )  # [B * blocks, H, block, d]
    y = y.view(batch, num_blocks, heads, block, width).transpose(1, 2)
    return y.reshape(batch, heads, num_blocks * block, width)[:, :, :num_tokens]


def _check_heads(name: str, dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise OperatorError(
            f"operator '{name}': num_heads={num_heads} does not divide dim={dim}; "
            "give the number of heads of the model"
        )


def _qkv_of(donor: AttentionDonor) -> tuple[Tensor, Tensor]:
    """Weights [3D, D] and biases [3D] of q, k and v stacked; an absent bias is zero."""
    weights = (donor.q_weight, donor.k_weight, donor.v_weight)
    biases = (donor.q_bias, donor.k_bias, donor.v_bias)
    filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return torch.cat(weights), torch.cat(filled)


@register("mha", targets=("mha",), package="grafting")
class MultiHeadAttention(Operator):
    """Multi-head softmax attention over all tokens, as in the published DiT."""

    readout_name = "proj"
    stackable = True

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads("mha", dim, num_heads)
        self.num_heads = num_heads
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        return softmax_attention(q, k, v).transpose(1, 2).flatten(2)

    def cost(self, num_tokens: int) -> Cost:
        dim = self.proj.out_features
        return Cost(
            operator=4.0 * num_tokens**2 * dim + 2.0 * num_tokens**2 * self.num_heads,
            featurizer=8.0 * num_tokens * dim**2,
            params=num_params(self),
        )

    def copy_donor(self, donor: Donor) -> list[str]:
        """All weights of an attention of the same width and number of heads."""
        if not isinstance(donor, AttentionDonor) or not _same_heads(self, donor, self.num_heads):
            return []
        weight, bias = _qkv_of(donor)
        return assign(
            self,
            {
                "qkv.weight": weight,
                "qkv.bias": bias,
                "proj.weight": donor.out_weight,
                "proj.bias": donor.out_bias,
            },
        )


@register("swa", targets=("mha",), package="grafting")
class SlidingWindowAttention(Operator):
    """Softmax attention over the neighbours |i - j| <= window, on both sides; linear in N."""

    stackable = True

    def __init__(self, *, dim: int, num_heads: int, window: Annotated[int, Field(ge=0)] = 4) -> None:
        super().__init__()
        _check_heads("swa", dim, num_heads)
        self.num_heads = num_heads
        self.window = window
        self.Wqkv = linear(dim, 3 * dim)
        self.out_proj = linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.Wqkv(x), self.num_heads)
        return window_attention(q, k, v, self.window).transpose(1, 2).flatten(2)

    def cost(self, num_tokens: int) -> Cost:
        dim = self.out_proj.out_features
        full = 4.0 * num_tokens**2 * dim + 2.0 * num_tokens**2 * self.num_heads
        return Cost(
            operator=full * min(1.0, (2 * self.window + 1) / num_tokens),
            featurizer=8.0 * num_tokens * dim**2,
            params=num_params(self),
        )

    def copy_donor(self, donor: Donor) -> list[str]:
        """All weights of an attention of the same width and number of heads."""
        if not isinstance(donor, AttentionDonor) or not _same_heads(self, donor, self.num_heads):
            return []
        weight, bias = _qkv_of(donor)
        return assign(
            self,
            {
                "Wqkv.weight": weight,
                "Wqkv.bias": bias,
                "out_proj.weight": donor.out_weight,
                "out_proj.bias": donor.out_bias,
            },
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window}"


def _same_heads(operator: Operator, donor: AttentionDonor, num_heads: int) -> bool:
    shape = operator.readout.weight.shape
    fits = all(w.shape == shape for w in (donor.q_weight, donor.k_weight, donor.v_weight, donor.out_weight))
    return fits and donor.num_heads == num_heads

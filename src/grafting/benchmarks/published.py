"""The plain forms of the published code, to measure against: the same weights, computed as it computes them.

Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from grafting.operators.attention import MultiHeadAttention, split_heads
from grafting.operators.hyena import HyenaX


class PublishedHyenaX(nn.Module):
    """hyena_x by transpose, `conv1d` and transpose back."""

    def __init__(self, own: HyenaX) -> None:
        super().__init__()
        self.in_proj, self.short_filter, self.out_proj = own.in_proj, own.short_filter, own.out_proj

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        u, layer = self.in_proj(x).transpose(1, 2), self.short_filter
        weight, bias = layer.weight.to(u.dtype), layer.bias.to(u.dtype)
        filtered = F.conv1d(u, weight, bias, padding=weight.shape[-1] - 1, groups=u.shape[1])
        q, k, v = filtered[..., : u.shape[2]].transpose(1, 2).chunk(3, dim=-1)
        return self.out_proj(q * k * v)


class PublishedAttention(nn.Module):
    """Attention by PyTorch's fused kernel."""

    def __init__(self, own: MultiHeadAttention) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = own.qkv, own.proj, own.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def published_form(model: nn.Module) -> nn.Module:
    """A copy of a model whose attentions and `hyena_x` compute as the published code's."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HyenaX):
                setattr(parent, name, PublishedHyenaX(child))
            elif isinstance(child, MultiHeadAttention):
                setattr(parent, name, PublishedAttention(child))
    return model

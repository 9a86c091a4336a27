"""Operators of a small size, and donors for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grafting import operators

DIM, HEADS, TOKENS = 16, 2, 12


def small(name: str, *, num_tokens: int = TOKENS, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return operators.build(name, dim=DIM, num_heads=HEADS, num_tokens=num_tokens, **config)


def attention_donor(dim: int = DIM, heads: int = HEADS, bias: bool = True) -> operators.AttentionDonor:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(dim, dim, generator=generator) / dim**0.5 for _ in range(4)]
    biases = [torch.randn(dim, generator=generator) if bias else None for _ in range(4)]
    return operators.AttentionDonor(*weights[:3], *biases[:3], weights[3], biases[3], heads)


def mlp_donor(dim: int = DIM, hidden: int = 4 * DIM) -> operators.MLPDonor:
    generator = torch.Generator().manual_seed(6)
    return operators.MLPDonor(
        torch.randn(hidden, dim, generator=generator) / dim**0.5,
        torch.randn(hidden, generator=generator),
        torch.randn(dim, hidden, generator=generator) / hidden**0.5,
        torch.randn(dim, generator=generator),
    )

"""Mamba-2: a selective state space model with a scalar decay per head (arXiv 2405.21060)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from grafting.errors import OperatorError
from grafting.operators.base import (
    AttentionDonor,
    Cost,
    Donor,
    Operator,
    assign,
    linear,
    num_params,
    unit_rows,
)
from grafting.operators.filters import DepthwiseFilter
from grafting.operators.registry import register
from grafting.operators.ssd import ssd

# Chosen on three layers of a DiT at 64 tokens, by the error that a fitted readout leaves.
STATE_SCALE = 0.25  # standard deviation of copied C and B before SiLU, about 1
VALUE_OFFSET = 3.0  # the constant in x, in the linear part of SiLU
READOUT_SCALE = 0.03  # the norm has lost the scale of the values; a fitted readout replaces this
Positive = Annotated[int, Field(ge=1)]


class GatedRMSNorm(nn.Module):
    """RMSNorm(x * silu(z)) * weight, in fp32; the gate comes before the norm."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x and z [B, N, dim] -> [B, N, dim]."""
        gated = x.float() * F.silu(z.float())
        gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (gated * self.weight.float()).to(x.dtype)


@register("mamba2", targets=("mha",), package="grafting")
class Mamba2(Operator):
    """The Mamba-2 block, causal, with one group of B and C; chunked, linear in N.

    `expand`: inner width over D. `head_dim`: channels that share a decay. `chunk_size`: tokens handled by
    one matrix product; it changes speed and memory, not the result.
    """

    def __init__(
        self,
        *,
        dim: int,
        d_state: Positive = 64,
        expand: Positive = 2,
        head_dim: Positive = 16,
        kernel_size: Positive = 4,
        chunk_size: Positive = 64,
    ) -> None:
        super().__init__()
        inner = expand * dim
        if inner % head_dim:
            raise OperatorError(
                f"operator 'mamba2': head_dim={head_dim} does not divide expand * dim = {inner}; "
                "choose a head_dim that does"
            )
        self.d_state, self.head_dim, self.chunk_size = d_state, head_dim, chunk_size
        heads = inner // head_dim
        self.in_proj = linear(dim, 2 * inner + 2 * d_state + heads, bias=False)  # z, x, B, C, dt
        self.conv1d = DepthwiseFilter(inner + 2 * d_state, kernel_size)
        # dt = softplus(dt_bias) is log-uniform in [1e-3, 1e-1] and A uniform in [1, 16] at the start.
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = linear(inner, dim, bias=False)

    def mix(self, x: Tensor) -> Tensor:
        inner, heads = self.norm.weight.shape[0], self.A_log.shape[0]
        z, xbc, dt = self.in_proj(x).split([inner, inner + 2 * self.d_state, heads], dim=-1)
        xbc = self._filtered(xbc)
        u, b, c = xbc.split([inner, self.d_state, self.d_state], dim=-1)
        u = u.unflatten(-1, (heads, self.head_dim))  # [B, N, H, P]
        dt = F.softplus(dt.float() + self.dt_bias.float())  # [B, N, H]
        a = -self.A_log.float().exp()
        scan = _installed_scan(u, self.d_state)
        if scan is not None:
            y = scan(u, dt, a, b, c, self.D)
        else:
            y = ssd(u, dt, dt * a, b, c, self.chunk_size) + u * self.D[:, None].to(u.dtype)
        return self.norm(y.flatten(2), z)

    def _filtered(self, x: Tensor) -> Tensor:
        """SiLU of the featurizer, [B, N, inner + 2 d_state]."""
        weight = self.conv1d.weight  # elsewhere under sequential CPU offload: then its own pass brings it
        fast = _installed_filter(x, weight.shape[-1]) if weight.device == x.device else None
        return F.silu(self.conv1d(x)) if fast is None else fast(x, self.conv1d.weight, self.conv1d.bias)

    def cost(self, num_tokens: int) -> Cost:
        dim, inner = self.out_proj.out_features, self.out_proj.in_features
        taps, channels = self.conv1d.weight.shape[-1], self.conv1d.weight.shape[0]
        projections = 2.0 * num_tokens * dim * (self.in_proj.out_features + inner)
        return Cost(
            operator=2.0 * num_tokens * inner * self.d_state,
            featurizer=projections + 2.0 * taps * num_tokens * channels,
            params=num_params(self),
        )

    def copy_donor(self, donor: Donor) -> list[str]:
        """C from Q, B from K, x and the gate z from V, the readout from O, as far as the shapes permit.

        Without a bias the gate cannot stay open by itself, so z carries the token's own value and x a
        constant plus the values: silu(z) * y is then near the value path of the attention. SiLU is undone
        by pairs: the copies of V that `expand` has room for alternate in sign, as do the columns of the
        readout. C and B take the d_state rows of Q and K that form the largest logits (further rows stay
        random), small about a constant, so that C . B is positive. The memory of the heads is fixed at first,
        spread from 4 to 64 tokens.
        """
        dim, inner = self.out_proj.weight.shape
        if not isinstance(donor, AttentionDonor) or donor.v_weight.shape != (dim, dim):
            return []
        like = donor.v_weight
        signs = [1.0 if copy % 2 == 0 else -1.0 for copy in range(inner // dim)]
        v = torch.cat([sign * like for sign in signs])
        v_bias = like.new_zeros(dim) if donor.v_bias is None else donor.v_bias

        rows = min(self.d_state, dim)
        use = donor.q_weight.float().norm(dim=1) * donor.k_weight.float().norm(dim=1)
        best = use.argsort(descending=True)[:rows]
        in_weight = self.in_proj.weight.detach().clone()
        in_weight[: 2 * inner] = torch.cat([0.5 * v, v])
        for start, weight in ((2 * inner, donor.k_weight), (2 * inner + self.d_state, donor.q_weight)):
            in_weight[start : start + rows] = STATE_SCALE * unit_rows(weight[best])
        in_weight[2 * (inner + self.d_state) :] = 0.0

        filter_weight = like.new_zeros(self.conv1d.weight.shape)
        filter_weight[..., -1] = 1.0
        offsets = torch.cat([VALUE_OFFSET + sign * v_bias for sign in signs])
        filter_bias = torch.cat([offsets, like.new_ones(2 * self.d_state)])

        # With dt A = 1 / memory and dt C . B = 1 / memory the state is a running mean of x.
        heads = self.A_log.shape[0]
        gain = self.d_state * (1.0 / (1.0 + math.exp(-1.0))) ** 2  # C . B of constants silu(1)
        place = torch.arange(heads, device=like.device) * self.head_dim % dim / dim
        memory = 4.0 * 16.0**place
        return assign(
            self,
            {
                "in_proj.weight": in_weight,
                "conv1d.weight": filter_weight,
                "conv1d.bias": filter_bias,
                "A_log": torch.full_like(memory, math.log(gain)),
                "dt_bias": torch.log(torch.expm1(1.0 / (memory * gain))),
                "D": torch.full_like(memory, 0.3),
                "out_proj.weight": torch.cat([READOUT_SCALE * s * donor.out_weight for s in signs], dim=1),
            },
        )

    def extra_repr(self) -> str:
        return f"d_state={self.d_state}, head_dim={self.head_dim}, chunk_size={self.chunk_size}"


def _installed_scan(u: Tensor, state: int) -> Callable[..., Tensor] | None:
    """The scan of an installed library, on CUDA."""
    if u.device.type != "cuda":
        return None
    from grafting.kernels import installed  # loads the compiler

    return installed.scan_for(u, state)


def _installed_filter(x: Tensor, taps: int) -> Callable[..., Tensor] | None:
    """The featurizer of an installed library, on CUDA."""
    if x.device.type != "cuda":
        return None
    from grafting.kernels import installed

    return installed.filter_silu_for(x, taps)

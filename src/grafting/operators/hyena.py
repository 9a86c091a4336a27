"""Gated short convolutions: `hyena_se`, `hyena_x`, `hyena_y` (StripedHyena 2, arXiv 2503.01868)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from grafting.kernels import gates
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

# Chosen on three layers of a DiT at 64 tokens; 0.1 to 0.5 are within 2 % after 100 steps of distillation.
GATE_SCALE = 0.25  # standard deviation of a copied gate about 1
OWN_SHARE = 0.15  # how much of an attention's output a token and its nearest neighbours carry, roughly
KernelSize = Annotated[int, Field(ge=1)]


class Hyena(Operator):
    """y = out(q * inner(k * v)) with q, k, v = featurizer(in(x)); a subclass says which filters there are.

    `featurizer`: a causal depthwise filter of the 3D projected channels. `inner`: one of the D gated ones.
    """

    has_featurizer: bool
    has_inner: bool
    stackable = True

    def __init__(self, *, dim: int, kernel_size: KernelSize = 4) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.in_proj = linear(dim, 3 * dim)
        if self.has_featurizer:
            self.short_filter = DepthwiseFilter(3 * dim, kernel_size)
        if self.has_inner:
            self.inner_filter = DepthwiseFilter(dim, kernel_size, identity=True)
        self.out_proj = linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        u = self.in_proj(x)  # [B, N, 3D]
        filters = self._filters()
        if filters is not None and gates.available(u, filters[0], filters[2]):
            return gates.gates(u, *filters)
        if self.has_featurizer:
            u = self.short_filter(u)
        q, k, v = u.chunk(3, dim=-1)  # each [B, N, D]
        gated = k * v
        if self.has_inner:
            gated = self.inner_filter(gated)
        return q * gated

    def _filters(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None:
        """Featurizer and inner filter, weight and bias each; None where several operators are stacked as one."""
        found: list[Tensor | None] = []
        for present, name in ((self.has_featurizer, "short_filter"), (self.has_inner, "inner_filter")):
            layer = getattr(self, name) if present else None
            if layer is None:
                found += [None, None]
            elif isinstance(layer, DepthwiseFilter):
                found += [layer.weight, layer.bias]
            else:
                return None
        return found[0], found[1], found[2], found[3]

    def cost(self, num_tokens: int) -> Cost:
        dim, taps = self.out_proj.out_features, self.kernel_size
        tokens_by_width = float(num_tokens * dim)
        return Cost(
            operator=(2 + 2 * taps * self.has_inner) * tokens_by_width,
            featurizer=(8 * dim + 6 * taps * self.has_featurizer) * tokens_by_width,
            params=num_params(self),
        )

    def copy_donor(self, donor: Donor) -> list[str]:
        """v from V, the gates from Q and K about 1, the readout from O.

        With gates 1 + small, q * k * v is the value path of the attention with a product term to train on.
        Every second filtered value is a running mean of K tokens, the others are the token itself.
        """
        dim, taps = self.out_proj.out_features, self.kernel_size
        if not isinstance(donor, AttentionDonor) or donor.v_weight.shape != (dim, dim):
            return []
        ones, zeros = donor.v_weight.new_ones(dim), donor.v_weight.new_zeros(dim)
        gates = [GATE_SCALE * unit_rows(w) for w in (donor.q_weight, donor.k_weight)]
        v_bias = zeros if donor.v_bias is None else donor.v_bias
        values: dict[str, Tensor | None] = {
            "in_proj.weight": torch.cat([*gates, donor.v_weight]),
            "in_proj.bias": torch.cat([ones, ones, v_bias]),
            "out_proj.weight": OWN_SHARE * donor.out_weight,
            "out_proj.bias": donor.out_bias,
        }
        channels = 3 * dim if self.has_featurizer else dim
        filter_weight = donor.v_weight.new_zeros(channels, 1, taps)
        filter_weight[..., -1] = 1.0
        filter_weight[channels - dim :: 2] = 1.0 / taps
        name = "short_filter" if self.has_featurizer else "inner_filter"
        values |= {f"{name}.weight": filter_weight, f"{name}.bias": None}
        return assign(self, values)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


@register("hyena_se", targets=("mha",), package="grafting")
class HyenaSE(Hyena):
    """Featurizer filter and inner filter."""

    has_featurizer = True
    has_inner = True


@register("hyena_x", targets=("mha",), package="grafting")
class HyenaX(Hyena):
    """Featurizer filter only: y = out(q * k * v)."""

    has_featurizer = True
    has_inner = False


@register("hyena_y", targets=("mha",), package="grafting")
class HyenaY(Hyena):
    """Inner filter only, initialised to the identity."""

    has_featurizer = False
    has_inner = True

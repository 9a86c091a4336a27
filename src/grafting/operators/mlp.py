"""Operators for the MLP of a block: `mlp` of another width, and the gated `mlp_hyena_x`."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from grafting.errors import OperatorError
from grafting.operators.base import Cost, Donor, MLPDonor, Operator, assign, linear, num_params
from grafting.operators.filters import ChannelFilter
from grafting.operators.registry import register

GELU_SLOPE = 0.2  # the tangent at 0 has 0.28; less is nearer for |u| up to 3
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def hidden_width(name: str, dim: int, ratio: float) -> int:
    """ratio * dim, which must be a whole number of at least 1 (`OperatorError`)."""
    hidden = round(ratio * dim)
    if hidden < 1 or abs(ratio * dim - hidden) > 1e-6 * hidden:
        raise OperatorError(
            f"operator '{name}': ratio={ratio} times dim={dim} is {ratio * dim:g} hidden units, "
            "not a whole number; "
            f"the nearest ratio that fits is {max(hidden, 1)}/{dim} = {max(hidden, 1) / dim!r}"
        )
    return hidden


def fit_units(donor: MLPDonor, own_weight: Tensor, own_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The donor's hidden units for a width F: input weight [F, D] and bias [F], output weight [D, F].

    If the donor has more, the most useful, by the norm of the input row times that of the output column. If
    it has fewer, the further units keep `own_weight` [F, D] and `own_bias` [F], with output zero.
    """
    width = donor.in_weight.shape[0]
    use = donor.in_weight.float().norm(dim=1) * donor.out_weight.float().norm(dim=0)
    units = use.argsort(descending=True)[: min(width, own_weight.shape[0])].sort().values
    in_weight = own_weight.detach().clone()
    in_bias = own_bias.detach().clone()
    out_weight = own_weight.new_zeros(donor.out_weight.shape[0], own_weight.shape[0])
    in_weight[: len(units)] = donor.in_weight[units]
    in_bias[: len(units)] = 0.0 if donor.in_bias is None else donor.in_bias[units]
    out_weight[:, : len(units)] = donor.out_weight[:, units]
    return in_weight, in_bias, out_weight


@register("mlp", targets=("mlp",), package="grafting")
class MLP(Operator):
    """Two linear layers with a tanh-approximated GELU between; `ratio` is the hidden width over D."""

    readout_name = "fc2"
    stackable = True

    def __init__(self, *, dim: int, ratio: Ratio = 4) -> None:
        super().__init__()
        hidden = hidden_width("mlp", dim, ratio)
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim)

    def mix(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc1(x), approximate="tanh")

    def cost(self, num_tokens: int) -> Cost:
        hidden, dim = self.fc1.weight.shape
        return Cost(operator=4.0 * num_tokens * hidden * dim, featurizer=0.0, params=num_params(self))

    def copy_donor(self, donor: Donor) -> list[str]:
        """The donor's hidden units: all, the most useful ones, or all and some with zero output."""
        if not isinstance(donor, MLPDonor) or donor.in_weight.shape[1] != self.fc1.in_features:
            return []
        in_weight, in_bias, out_weight = fit_units(donor, self.fc1.weight, self.fc1.bias)
        return assign(
            self,
            {
                "fc1.weight": in_weight,
                "fc1.bias": in_bias,
                "fc2.weight": out_weight,
                "fc2.bias": donor.out_bias,
            },
        )


@register("mlp_hyena_x", targets=("mlp",), package="grafting")
class MLPHyenaX(Operator):
    """y = out(q * k * v) with q, k, v of width rD, filtered along the *channels* with one filter per token.

    The filter runs over all 3rD channels before they are split, so it crosses the borders of q, k and v. It
    is tied to the number of tokens it was built for.
    """

    def __init__(
        self, *, dim: int, num_tokens: int, ratio: Ratio = 2, kernel_size: Annotated[int, Field(ge=1)] = 4
    ) -> None:
        super().__init__()
        hidden = hidden_width("mlp_hyena_x", dim, ratio)
        self.num_tokens = num_tokens
        self.in_proj = linear(dim, 3 * hidden)
        self.short_filter = ChannelFilter(num_tokens, kernel_size)
        self.out_proj = linear(hidden, dim)

    def _check_tokens(self, num_tokens: int) -> None:
        if num_tokens != self.num_tokens:
            raise OperatorError(
                f"operator 'mlp_hyena_x' has one filter for each of {self.num_tokens} tokens "
                f"and got {num_tokens}; build it for that number (num_tokens=) or use 'mlp', which takes any"
            )

    def mix(self, x: Tensor) -> Tensor:
        self._check_tokens(x.shape[1])
        u = self.short_filter(self.in_proj(x))
        q, k, v = u.chunk(3, dim=-1)  # each [B, N, rD]
        return q * k * v

    def cost(self, num_tokens: int) -> Cost:
        self._check_tokens(num_tokens)
        dim, hidden = self.out_proj.weight.shape
        return Cost(
            operator=8.0 * num_tokens * hidden * dim + 2.0 * num_tokens * hidden,
            featurizer=0.0,
            params=num_params(self),
        )

    def copy_donor(self, donor: Donor) -> list[str]:
        """q from the donor's most useful hidden units, k and v such that q * k * v is near their GELU.

        GELU is u times the normal distribution function of u, and that function near the square of
        sqrt(1/2) + GELU_SLOPE u: so q = u and k = v = that, with the filter at the identity.
        """
        hidden = self.out_proj.in_features
        if not isinstance(donor, MLPDonor) or donor.in_weight.shape[1] != self.in_proj.in_features:
            return []
        weight, bias, out_weight = fit_units(donor, self.in_proj.weight[:hidden], self.in_proj.bias[:hidden])
        filter_weight = weight.new_zeros(self.short_filter.weight.shape)
        filter_weight[..., -1] = 1.0
        gate_weight, gate_bias = GELU_SLOPE * weight, 0.5**0.5 + GELU_SLOPE * bias
        return assign(
            self,
            {
                "in_proj.weight": torch.cat([weight, gate_weight, gate_weight]),
                "in_proj.bias": torch.cat([bias, gate_bias, gate_bias]),
                "short_filter.weight": filter_weight,
                "short_filter.bias": None,
                "out_proj.weight": out_weight,
                "out_proj.bias": donor.out_bias,
            },
        )

"""What an operator is: the contract, its cost, and the donor weights that it may start from.

Axes in this folder: B batch, N tokens (raster order), D width, H heads, K filter taps, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cost:
    """What one sample costs in one operator, counted as Table 4 of arXiv 2506.05340 counts.

    `operator`: FLOPs of the operator proper. `featurizer`: FLOPs of projections and featurizers.
    `params`: number of parameters. Two FLOPs per multiply-add.
    """

    operator: float
    featurizer: float
    params: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.operator + other.operator, self.featurizer + other.featurizer, self.params + other.params
        )

    @property
    def total(self) -> float:
        """FLOPs of operator and featurizer together."""
        return self.operator + self.featurizer


@dataclass(frozen=True)
class AttentionDonor:
    """The weights of a self-attention in the form every family can give.

    `*_weight` [D, D] act as `x @ weight.T`; heads are consecutive slices of the outputs of q, k and v.
    """

    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    num_heads: int


@dataclass(frozen=True)
class MLPDonor:
    """The weights of a two-layer MLP: `in_weight` [F, D], `out_weight` [D, F]."""

    in_weight: Tensor
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None


Donor = AttentionDonor | MLPDonor


class Operator(nn.Module):
    """An operator [B, N, D] -> [B, N, D]: features of the tokens, then one linear readout.

    A subclass defines `mix` (everything before the last linear layer) and `readout_name`, `copy_donor` if a donor's
    weights can give it something, and `cost` where a count of its matrix products is not enough. Any other `nn.Module`
    of the same shape can be registered as an operator too; it then goes without a fitted readout and a donor start.
    """

    readout_name: str = "out_proj"
    operator_name: str = ""
    # Several of one kind may run as one (models/stacked.py): every sample of a batch is treated alike, and weights are
    # used only by calling linear layers and depthwise filters.
    stackable: bool = False

    @property
    def readout(self) -> nn.Linear:
        """The last linear layer, F -> D."""
        layer = self.get_submodule(self.readout_name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"{type(self).__name__}.{self.readout_name} is {type(layer).__name__}, not nn.Linear"
            )
        return layer

    def mix(self, x: Tensor) -> Tensor:
        """Features [B, N, F] of the tokens x [B, N, D]: all of the operator but the readout."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.get_submodule(self.readout_name)(self.mix(x))

    def cost(self, num_tokens: int) -> Cost:
        """Cost for one sample of `num_tokens` tokens; by default counted by a traced forward pass (`cost_of`)."""
        return cost_of(self, num_tokens, self.readout.out_features)

    def copy_donor(self, donor: Donor) -> list[str]:
        """Copy what the donor's weights can give; names of the parameters set (none: nothing fits)."""
        return []


def num_params(module: nn.Module) -> int:
    """Number of parameters of a module, on any device, meta too."""
    return sum(p.numel() for p in module.parameters())


def cost_of(module: nn.Module, num_tokens: int, dim: int) -> Cost:
    """Cost of any module that maps [B, N, D] -> [B, N, D], for one sample.

    The module's own `cost(num_tokens)` if it has one; else one traced forward in evaluation mode, on the
    module's device (meta included), whose matrix products, convolutions and attentions are counted.
    """
    own = getattr(module, "cost", None)
    if callable(own) and getattr(type(module), "cost", None) is not Operator.cost:
        cost = own(num_tokens)
        if isinstance(cost, Cost):
            return cost
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.zeros(1, num_tokens, dim, device=like.device, dtype=like.dtype)
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        from torch.utils.flop_counter import FlopCounterMode  # loads Triton where it is installed

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x)
    finally:
        for m, mode in modes:
            m.training = mode
    return Cost(float(counter.get_total_flops()), 0.0, num_params(module))


def copy_donor(module: nn.Module, donor: Donor | None) -> list[str]:
    """`module.copy_donor(donor)` where the module has it; the names of the parameters that were set."""
    own = getattr(module, "copy_donor", None)
    if donor is None or not callable(own):
        return []
    with torch.no_grad():
        return list(own(donor) or [])


def takes_donor(operator: type[nn.Module]) -> bool:
    """Whether operators of this class can start from a donor's weights."""
    own = getattr(operator, "copy_donor", None)
    return callable(own) and own is not Operator.copy_donor


def assign(module: nn.Module, values: dict[str, Tensor | None]) -> list[str]:
    """Copy tensors into named parameters and return the names.

    A value of None stands for an absent bias: the parameter becomes zero.
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            if value is None:
                parameters[name].zero_()
            else:
                parameters[name].copy_(value)
    return list(values)


def unit_rows(weight: Tensor) -> Tensor:
    """[F, D] with every row scaled to norm 1: unit variance in gives unit variance out, roughly."""
    return weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-6)


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer initialised as DiT initialises its own: Xavier uniform, bias zero."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer

"""Modules of one shape run as one: their weights stacked along a first axis, their batches side by side.

A stacked module takes a batch of n * B samples, module after module (the first B go through module 0), and runs the
code of the module that it was made of, with its linear layers and filters in stacked form.
Axes: n modules, B batch, N tokens, D width, F features, K filter taps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grafting.operators.filters import DepthwiseFilter, causal_filter

# Of torch's own, those that treat every sample alike and hold no weights (LayerNorm: without its affine part).
_PLAIN = (nn.Sequential, nn.SiLU, nn.GELU, nn.Identity, nn.LayerNorm)


class Unlike(Exception):
    """Why some modules can't run as one; in words for `explain`."""


class StackedLinear(nn.Module):
    """n linear layers: weight [n, F_out, F_in], bias [n, F_out]; [n * B, ..., F_in] -> [n * B, ..., F_out]."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.weight), -1, self.in_features)  # [n, B * ..., F_in]
        across = self.weight.transpose(1, 2)
        y = torch.bmm(rows, across) if self.bias is None else torch.baddbmm(self.bias[:, None], rows, across)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"n={len(self.weight)}, in_features={self.in_features}, out_features={self.out_features}"


class StackedFilter(nn.Module):
    """n causal depthwise filters along the tokens: weight [n, D, 1, K], bias [n, D]; [n * B, N, D] -> the same."""

    bias: nn.Parameter

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        count = len(self.weight)
        side = x.unflatten(0, (count, -1)).movedim(0, 2).flatten(2)  # [B, N, n * D]
        y = causal_filter(side, self.weight.flatten(0, 1), self.bias.flatten())
        return y.unflatten(2, (count, -1)).movedim(2, 0).flatten(0, 1)

    def extra_repr(self) -> str:
        count, channels, _, taps = self.weight.shape
        return f"n={count}, channels={channels}, kernel_size={taps}"


_STACKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: StackedLinear, DepthwiseFilter: StackedFilter}


def stack(modules: Sequence[nn.Module], where: str = "") -> nn.Module:
    """One module that does what `modules` do, with new weights [n, ...] in the place of theirs. Raises `Unlike`.

    They must have one class and one configuration, and be of a kind with a stacked form: linear layers, depthwise
    filters, and whatever is made of these and says `stackable = True`.
    """
    first = modules[0]
    names = [getattr(m, "operator_name", "") or type(m).__name__ for m in modules]
    place = f"{where}: " if where else ""
    if any(type(m) is not type(first) for m in modules) or len(set(names)) > 1:
        raise Unlike(f"{place}{' against '.join(dict.fromkeys(names))}")
    form = _STACKED.get(type(first))
    own = any(value is not None for held in (first._parameters, first._buffers) for value in held.values())
    if form is None and (own or not (getattr(first, "stackable", False) or type(first) in _PLAIN)):
        raise Unlike(f"{place}{names[0]} has no batched form")
    if any(_settings(m) != _settings(first) for m in modules) or _shapes(modules) != 1:
        raise Unlike(f"{place}{names[0]} of unlike configuration")
    if form is not None:
        return form(*(_stacked([getattr(m, name) for m in modules], place) for name in ("weight", "bias")))
    result = _shell(first)
    for name in first._modules:
        children = [m._modules[name] for m in modules]
        if any(child is None for child in children):
            continue
        result._modules[name] = stack([c for c in children if c is not None], f"{where}.{name}".lstrip("."))
    return result


def take(module: nn.Module, index: int, *, share: bool) -> nn.Module:
    """Module number `index` of a stacked one, in its plain form.

    share: its weights are the rows themselves, detached (to look at, or to run without gradients); else copies.
    """
    for plain, form in _STACKED.items():
        if type(module) is form:
            return _plain(plain, module, index, share)
    result = _shell(module)
    for name, child in module._modules.items():
        if child is not None:
            result._modules[name] = take(child, index, share=share)
    return result


def _plain(kind: type[nn.Module], module: nn.Module, index: int, share: bool) -> nn.Module:
    weight: Any = module.weight
    bias: Any = module.bias
    with torch.device("meta"):
        if kind is nn.Linear:
            result: nn.Module = nn.Linear(weight.shape[2], weight.shape[1], bias=bias is not None)
        else:
            result = DepthwiseFilter(weight.shape[1], weight.shape[3])
    for name, stacked in (("weight", weight), ("bias", bias)):
        if stacked is not None:
            row = stacked.detach()[index]
            parameter = nn.Parameter(row if share else row.clone(), requires_grad=stacked.requires_grad)
            setattr(result, name, parameter)
    return result.train(module.training)


def _stacked(parameters: Sequence[nn.Parameter | None], place: str) -> nn.Parameter | None:
    present = [p for p in parameters if p is not None]
    if not present:
        return None
    if any(p.requires_grad != present[0].requires_grad for p in present):
        raise Unlike(f"{place}weights of which some are frozen")
    return nn.Parameter(torch.stack([p.detach() for p in present]), requires_grad=present[0].requires_grad)


def _shapes(modules: Sequence[nn.Module]) -> int:
    """How many different sets of own parameters (name, shape) and children these modules have."""
    return len({
        (tuple((name, None if p is None else p.shape) for name, p in m._parameters.items()), tuple(m._modules))
        for m in modules
    })  # fmt: skip


def _settings(module: nn.Module) -> dict[str, Any]:
    """The public plain attributes: what a module is configured by, apart from shapes."""
    return {
        name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"
    }


def _shell(module: nn.Module) -> nn.Module:
    """A copy that shares nothing that can change; its parameters and children are the same objects."""
    result = copy.copy(module)
    for name, value in vars(result).items():
        if isinstance(value, dict):
            vars(result)[name] = value.copy()
    return result

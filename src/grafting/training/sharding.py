"""How stage 2 holds its model: whole in every process, or cut over all of them (FSDP2, `fully_shard`).

Both hand out parameters that an optimizer, an average and a checkpoint treat alike: the whole tensors, or this
process's parts of them. Checkpoints always hold whole tensors, so that they load on any number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from grafting.training.compute import Compute

Result = TypeVar("Result")
_AWAY: torch.device | torch.dtype = torch.device("cpu")  # where a model waits whose weights are cut


class Holding(Protocol):
    """A model in training. `loss_scale` goes on every loss; `parameters` are by name, of those that learn."""

    parameters: dict[str, nn.Parameter]
    loss_scale: float
    takes_all: bool  # whether every process has to take part in each call

    def call(self, work: Callable[[nn.Module], Result]) -> Result:
        """`work(model)`; every use of the model goes through here."""

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""

    def finish_gradients(self, clip: float) -> Tensor:
        """After backward: gradients of the global batch on `parameters`, clipped by the global norm; that norm."""

    def clear_gradients(self) -> None:
        """Drop all gradients."""

    def whole(self, name: str, value: Tensor) -> Tensor:
        """A value laid out as parameter `name` -> the whole tensor. Every process has to take part."""

    def part(self, name: str, value: Tensor) -> Tensor:
        """The inverse of `whole`."""

    def hand_back(self) -> None:
        """Put the parameters into the model that was given."""


class Replicated:
    """The whole model in every process; gradients are summed once a step."""

    loss_scale = 1.0
    takes_all = False

    def __init__(self, model: nn.Module, names: Sequence[str], compute: Compute) -> None:
        self.model, self.compute = model, compute
        named = dict(model.named_parameters())
        self.parameters = {name: named[name] for name in names}

    def call(self, work: Callable[[nn.Module], Result]) -> Result:
        return work(self.model)

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def finish_gradients(self, clip: float) -> Tensor:
        parameters = list(self.parameters.values())
        self.compute.sum_gradients(parameters)
        return nn.utils.clip_grad_norm_(parameters, clip)

    def clear_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def whole(self, name: str, value: Tensor) -> Tensor:
        return value

    def part(self, name: str, value: Tensor) -> Tensor:
        return value

    def hand_back(self) -> None:
        pass


class _Root(nn.Module):
    """Within its forward the parameters outside of all blocks are whole, whatever the work does with the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)


class Sharded:
    """A copy of the model cut over all processes: weights, gradients, and what is laid out like them.

    A block is gathered when it computes. The model that was given waits on the CPU, but for tensors that it shares with
    `beside`, a model that goes on computing with them.
    """

    takes_all = True

    def __init__(
        self, model: nn.Module, names: Sequence[str], blocks: Sequence[str], compute: Compute,
        beside: nn.Module | None = None,
    ) -> None:  # fmt: skip
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.given, self.compute = model, compute
        self.loss_scale = float(compute.world)  # fully_shard averages gradients over the processes
        inner = copy.deepcopy(model).to(compute.device)
        _send_away(model, beside)
        mesh = init_device_mesh(compute.device.type, (compute.world,))
        for path in dict.fromkeys(blocks):
            fully_shard(inner.get_submodule(path), mesh=mesh, reshard_after_forward=True)
        self.root = _Root(inner)
        fully_shard(self.root, mesh=mesh, reshard_after_forward=True)  # or an evaluation would leave it stale
        named: dict[str, Any] = dict(inner.named_parameters())
        self.sharded = {name: named[name] for name in names}
        self.parameters = {name: nn.Parameter(p.to_local().detach()) for name, p in self.sharded.items()}

    def call(self, work: Callable[[nn.Module], Result]) -> Result:
        result: Result = self.root(work)
        return result

    def train(self, mode: bool) -> None:
        self.root.train(mode)

    def finish_gradients(self, clip: float) -> Tensor:
        for name, parameter in self.parameters.items():
            whole = self.sharded[name]
            parameter.data = whole.to_local().detach()  # the first forward may have moved it
            parameter.grad = None if whole.grad is None else whole.grad.to_local()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        norm = self.compute.sum(squares).sqrt()
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clear_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.sharded[name].grad = None

    def whole(self, name: str, value: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self.sharded[name]
        placed = DTensor.from_local(
            value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        found: Tensor = placed.full_tensor()
        return found

    def part(self, name: str, value: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        like = self.sharded[name]
        placed = distribute_tensor(
            value.to(self.compute.device), like.device_mesh, like.placements, src_data_rank=None
        )
        return placed.to_local().clone()

    def hand_back(self) -> None:
        self.given.to(self.compute.device)
        named = dict(self.given.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                named[name].copy_(self.whole(name, parameter.detach()))


def _send_away(model: nn.Module, beside: nn.Module | None) -> None:
    """Move a model's own tensors; `Module.to` works in place and would move those that are `beside`'s as well."""
    kept = set() if beside is None else {id(t) for t in (*beside.parameters(), *beside.buffers())}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(_AWAY)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if id(buffer) not in kept:
                setattr(module, name, buffer.to(_AWAY))


def hold(
    model: nn.Module, names: Sequence[str], blocks: Sequence[str], compute: Compute, shard: str,
    beside: nn.Module | None = None,
) -> Holding:  # fmt: skip
    """The model as `shard` says: `none`, or `full` where there are several processes.

    beside: a model on the device that may share tensors with it; those stay where they are.
    """
    if shard == "full" and compute.world > 1:
        return Sharded(model, names, blocks, compute, beside)
    return Replicated(model, names, compute)


def _mapped(
    state: Mapping[str, Any], names: Sequence[str], change: Callable[[str, Tensor], Tensor]
) -> dict[str, Any]:
    moments = {
        number: {
            key: change(names[number], value) if isinstance(value, Tensor) and value.ndim else value
            for key, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    return {**state, "state": moments}


def optimizer_state(
    states: Mapping[str, Any], names: Sequence[str], change: Callable[[str, Tensor], Tensor]
) -> dict[str, Any]:
    """The state of optimizers over the parameters `names`, moments changed by `Holding.whole` or `Holding.part`.

    A state of several optimizers has its own numbering and is never cut: it comes back as it is.
    """
    if len(states) > 1:
        return dict(states)
    return {part: _mapped(state, names, change) for part, state in states.items()}

"""Where a stage computes: device, precision, and this process's share among several (through accelerate)."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grafting.errors import GraftError


@dataclass(frozen=True)
class Compute:
    """This process among `world`. A global batch is cut by sample index, so the result does not depend on `world`."""

    device: torch.device
    precision: str  # "fp32" or "bf16" (autocast, weights stay as they are)
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which models compute."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a global batch of indices. Raises GraftError where it would be empty."""
        if len(index) < self.world:
            raise GraftError(
                f"batch_size={len(index)} is less than one sample for each of {self.world} processes; "
                "give a larger batch_size or fewer processes"
            )
        return index[self.rank :: self.world]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes (a no-op for one)."""
        if self.world == 1:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor, reduction="sum")

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes, whose shares are of one size."""
        return self.sum(values) / self.world

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes in one message; losses are scaled so that the sum is the mean."""
        if self.world == 1:
            return
        present = [p for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([p.grad.reshape(-1).float() for p in present if p.grad is not None]))
        offset = 0
        for parameter in present:
            count = parameter.numel()
            parameter.grad = flat[offset : offset + count].view_as(parameter).to(parameter.dtype)
            offset += count

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def _fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are quicker there than fp32 ones: recent GPUs, and CPUs with matrix tiles."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and tiles is not None and bool(tiles())


def is_one_of_several() -> bool:
    """Whether this process was started as one of several (accelerate launch, torchrun, --processes)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def make_compute(device: torch.device, precision: str = "auto") -> Compute:
    """The compute of this process. Under `accelerate launch` or `torchrun` it is one of several."""
    rank, world = 0, 1
    if is_one_of_several():
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        rank, world = state.process_index, state.num_processes
        device = state.device
    if precision == "auto":
        precision = "bf16" if _fast_bf16(device) else "fp32"
    if precision not in ("fp32", "bf16"):
        raise GraftError(f"precision {precision!r}: expected auto, fp32 or bf16")
    return Compute(device=device, precision=precision, rank=rank, world=world)

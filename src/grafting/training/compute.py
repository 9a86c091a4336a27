"""Where a stage computes: device, precision, and this process's share among several."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grafting import processes
from grafting.errors import GraftError, PeerError

_BUCKET = 2**26  # gradient values per message


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

    def parts(self, index: Tensor, micro_batch: int = 0) -> list[tuple[Tensor, float]]:
        """This process's share of a global batch, cut into (samples, weight); at most `micro_batch` samples, 0: all.

        Weighted and summed over parts and processes, the parts' means are the mean over the batch. Every process has as
        many parts (those without samples of their own repeat one with weight 0): sharded models compute together.
        """
        mine = index[self.rank :: self.world]
        size = micro_batch or len(index)
        count = math.ceil(math.ceil(len(index) / self.world) / size)
        cut = [mine[number * size : (number + 1) * size] for number in range(count)]
        return [(part if len(part) else index[:1], len(part) / len(index)) for part in cut]

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """This process's share of a list, which may be empty."""
        return list(items[self.rank :: self.world])

    # ---- messages between processes; each is a no-op for one

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        with _reaching_others():
            dist.all_reduce(total, group=processes.control() if total.device.type == "cpu" else None)
        return total

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over all processes, in few large messages; losses are scaled so that it is the mean."""
        if self.world == 1:
            return
        present = [p for p in parameters if p.grad is not None]
        while present:
            size, count = 0, 0
            while count < len(present) and (count == 0 or size + present[count].numel() <= _BUCKET):
                size, count = size + present[count].numel(), count + 1
            bucket, present = present[:count], present[count:]
            flat = self.sum(torch.cat([p.grad.reshape(-1).float() for p in bucket if p.grad is not None]))
            for parameter, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = total.view_as(parameter).to(parameter.dtype)

    def equalise(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values, in place: devices may round a start differently."""
        if self.world == 1:
            return
        import torch.distributed as dist

        with _reaching_others(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def from_main(self, value: Any) -> Any:
        """The first process's value (small, picklable) on all of them: decisions are taken once."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _reaching_others():
            dist.broadcast_object_list(box, 0, group=processes.control())
        return box[0]

    def agree_to_stop(self, code: int | None) -> int | None:
        """The exit status that a signal to any process asked for: all stop at the same step."""
        if self.world == 1:
            return code
        import torch.distributed as dist

        asked = torch.tensor([143 if code is None and processes.orphaned() else code or 0])
        with _reaching_others():
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=processes.control())
        return int(asked) or None

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait for all processes, which may take long: the first may be writing, or another still drawing.

        `meanwhile` is called now and then.
        """
        if self.world > 1:
            processes.meet(meanwhile)
        # All know by now that all are here: the first, who keeps the notes, may go on and end.
        self.agree_to_stop(None)


@contextlib.contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            "another process of this run has ended or can't be reached "
            f"({str(error).splitlines()[0][:120]}); --resume goes on from the last checkpoint"
        ) from None


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 matrix products are quicker there than fp32 ones: recent GPUs, and CPUs with matrix tiles."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and tiles is not None and bool(tiles())


def own_precision(device: torch.device, precision: str) -> str:
    """fp32 or bf16: what `auto` is on this process's device. Asks no other process, which may say otherwise."""
    return precision if precision != "auto" else "bf16" if multiplies_bf16_fast(device) else "fp32"


def _own_device(device: torch.device, where: processes.Place) -> torch.device:
    """The device of one of several processes: the CPU, or the accelerator of its number on this machine.

    A process that sees one GPU may have been given it for itself, as Slurm's --gpus-per-task=1 does: it takes that one,
    unless another process has the same.
    """
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count == 1 and device.type == "cuda":
        torch.accelerator.set_device_index(0)
        _refuse_shared(str(torch.cuda.get_device_properties(0).uuid), where)
        return torch.device("cuda", 0)
    if where.local_rank >= count or device.type == "mps":
        raise GraftError(
            f"process {where.rank} of {where.world} is number {where.local_rank} on a machine with {count} devices "
            f"of type {device.type}; start at most one process for each"
        )
    torch.accelerator.set_device_index(where.local_rank)
    _refuse_shared("", where)
    return torch.device(device.type, where.local_rank)


@functools.cache  # what is settled once, when the processes meet, need not cost a message in every stage
def _refuse_shared(device: str, where: processes.Place) -> None:
    """Raise GraftError where two processes have the same `device` (its UUID; "": one of several, by number)."""
    import torch.distributed as dist

    found: list[Any] = [None] * where.world
    with _reaching_others():
        dist.all_gather_object(found, device, group=processes.control())
    same = [str(rank) for rank, other in enumerate(found) if other == device]
    if device and len(same) > 1:
        raise GraftError(
            f"processes {', '.join(same)} of {where.world} see one GPU, and it is the same ({device}); start one "
            "process for each GPU, or give each its own (srun --gpus-per-task=1)"
        )


def make_compute(device: torch.device, precision: str = "auto") -> Compute:
    """The compute of this process. Under --processes, `accelerate launch`, `torchrun` or `srun` it is one of several.

    Raises GraftError (unknown precision, more processes than devices, the others can't be reached).
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise GraftError(f"precision {precision!r}: expected auto, fp32 or bf16")
    where = processes.join()
    if where.world > 1:
        device = _own_device(device, where)
    compute = Compute(device=device, precision=precision, rank=where.rank, world=where.world)
    if precision == "auto":
        return replace(compute, precision=compute.from_main(own_precision(device, precision)))
    return compute

"""Peak memory of a piece of work: the allocator's own figure on CUDA, elsewhere the live bytes of tensors."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages that come into being while this is active and are still referenced.

    Works on any device, the meta device included (which computes nothing and allocates nothing). Storages that
    were there before are not counted, nor is what a kernel allocates and frees inside of itself. `peak`: the most
    that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: dict[int, weakref.ref[Any]] = {}
        self._older: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            key = storage._cdata
            if key not in self._counted and key not in self._older:
                self._older[key] = weakref.ref(storage, lambda _, key=key: self._older.pop(key, None))  # type: ignore[misc]
        output = func(*args, **kwargs)
        for storage in _storages(output):
            self._count(storage)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted or key in self._older:
            return

        def freed(_: object) -> None:
            self._counted.pop(key, None)
            self.live -= size

        self._counted[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `work` had allocated at once, beyond what was there when it began.

    On CUDA from `torch.cuda.max_memory_allocated`; elsewhere counted by `LiveBytes`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as tracked:
        work()
    return tracked.peak


class StagePeak:
    """The most memory that a stage took, from when this was made: of the device on CUDA, of the process elsewhere.

    `source` says in words which. On the CPU it is the resident set with Python and all libraries; where the system
    can't forget an earlier peak (only Linux can), it is the most since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.source = "torch.cuda.max_memory_allocated"
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.source = "resident set of the process"
        except OSError:
            self.source = "resident set of the process since it began"

    def bytes(self) -> int:
        """Bytes at the peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration, ValueError):
            import resource

            scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, kilobytes here
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def gigabytes(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def memory_source(device: torch.device) -> str:
    """In words, where the figures of `peak_bytes` come from on this device."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    return "live bytes of tensors; what a kernel allocates inside of itself is not counted"


def weight_bytes(*models: nn.Module) -> int:
    """Bytes of all parameters and buffers of models; shared ones once."""
    seen = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for model in models for t in (*model.parameters(), *model.buffers())}  # fmt: skip
    return sum(seen.values())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_iter(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()

"""Peak memory of a piece of work: the allocator's own figure on CUDA, elsewhere the live bytes of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
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


def memory_source(device: torch.device) -> str:
    """In words, where the figures of `peak_bytes` come from on this device."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated"
    return "live bytes of tensors; what a kernel allocates inside of itself is not counted"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model; shared ones once."""
    seen = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers())}  # fmt: skip
    return sum(seen.values())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_iter(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()

"""Checkpoints written while training goes on: the state is copied to the host, one thread writes the copy."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from grafting.training.loop import Journal


class CheckpointWriter:
    """Saves the checkpoints of a stage in the background, one at a time, in their order.

    A context: its end waits for the last one. An error of the writer is raised by the next call, or by the end; no
    later step's error and no stop hides it, since that checkpoint would have failed before.
    """

    def __init__(self, journal: Journal, stage: str, keep: int) -> None:
        self.journal, self.stage, self.keep = journal, stage, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: Mapping[str, Any], given: Sequence[Tensor] = ()) -> None:
        """Write `state`, as it is now, as that after `step`; waits only for the checkpoint before it.

        given: tensors of it on the host that nobody else has: they are not copied.
        """
        self.wait()
        if not self.journal.keeps_checkpoints:
            return
        self._thread = threading.Thread(
            target=self._write, args=(step, *snapshot(state, given)), name="grafting-checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the writer raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, state: dict[str, Any], copying: list[torch.cuda.Event]) -> None:
        try:
            for event in copying:
                event.synchronize()
            self.journal.save_checkpoint(self.stage, step, state, self.keep)
        except BaseException as error:  # raised where somebody sees it
            self._error = error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            if error is None or isinstance(error, Exception):  # not Ctrl-C, which is to end at once
                raise


def snapshot(
    state: Mapping[str, Any], given: Sequence[Tensor] = ()
) -> tuple[dict[str, Any], list[torch.cuda.Event]]:
    """A copy of `state` on the host that shares nothing with it but `given`, and what to wait for before it is read.

    From CUDA into pinned memory: the copies queue before whatever the device is given next, and the host goes on.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(state)}
    copies: dict[int, Any] = {id(tensor): tensor for tensor in given}
    copies |= {key: _on_host(tensor.detach()) for key, tensor in tensors.items() if key not in copies}
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    copying = [torch.cuda.current_stream(device).record_event() for device in devices]
    return copy.deepcopy(dict(state), copies), copying


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _on_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)

"""What a model is conditioned on: a tensor of class numbers [B], or a structure of tensors such as `Caption`.

The functions here treat both alike: a tuple or mapping of tensors that all have the batch as their first axis.
Axes: B batch, T text tokens, E width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Caption(NamedTuple):
    """Encoded captions, each with its unconditional counterpart (the empty caption), padded to one length."""

    embeds: Tensor  # [B, T, E]
    mask: Tensor  # [B, T], 1 where there is a token
    null_embeds: Tensor  # [B, T, E]
    null_mask: Tensor  # [B, T]

    @property
    def null(self) -> Caption:
        """The empty caption in the place of each."""
        return Caption(self.null_embeds, self.null_mask, self.null_embeds, self.null_mask)


def each(function: Callable[..., Tensor], *conditions: Any) -> Any:
    """`function` on the corresponding tensors of conditionings of one structure."""
    first = conditions[0]
    if isinstance(first, Tensor):
        return function(*conditions)
    if isinstance(first, Mapping):
        return {key: each(function, *(c[key] for c in conditions)) for key in first}
    if isinstance(first, tuple):
        parts = [each(function, *items) for items in zip(*conditions, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    raise TypeError(f"a conditioning is a tensor, tuple or mapping, not {type(first).__name__}")


def move(condition: Any, device: torch.device | str) -> Any:
    """The conditioning on a device; an accelerator is not waited for."""
    kind = torch.device(device).type

    def moved(tensor: Tensor) -> Tensor:
        if (
            kind == "cuda" and tensor.device.type == "cpu"
        ):  # from other memory the copy would wait for the device
            tensor = tensor.contiguous()  # one that was expanded (the empty caption) can't be pinned
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=kind != "cpu")  # copies to the CPU have to be complete

    return each(moved, condition)


def take(condition: Any, rows: Tensor | slice) -> Any:
    """Some of the batch."""
    return each(lambda tensor: tensor[rows], condition)


def join(first: Any, second: Any) -> Any:
    """Two conditionings as one doubled batch, `first` first."""
    return each(lambda a, b: torch.cat([a, b]), first, second)


def choose(chosen: Tensor, these: Any, others: Any) -> Any:
    """Per sample: `these` where `chosen` [B] holds, `others` elsewhere."""
    return each(lambda a, b: torch.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), these, others)

"""What both analyses of a running model share: which noised inputs it sees, and a look at what its operators get.

Axes: B batch, N tokens, D width, T timestep bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from grafting.diffusion import NUM_TIMESTEPS
from grafting.errors import GraftError

Progress = Callable[[int, int], None]


@contextmanager
def inputs_seen(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, `see(path, x [B, N, D])` is called with what each module is given, before it computes.

    Taps would cost a second pass at every step of a sampling trajectory; this looks at the sampler's own.
    """

    def hook_of(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            see(path, given[0])

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(path), with_kwargs=True) for path, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; every module goes back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_counts(**counts: int) -> None:
    """Raise GraftError that names the first of these that is no whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GraftError(f"{name}={value!r}: expected a whole number of at least 1")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are. Raises GraftError for the meta device, where there are none."""
    device = next(model.parameters()).device
    if device.type == "meta":
        raise GraftError(
            "this model is on the meta device and has no weights to run it with; load it on cpu or a GPU"
        )
    return device


def bin_edges(num_bins: int) -> list[list[int]]:
    """Timesteps [first, last] of each bin, of equal length up to rounding. Raises GraftError."""
    check_counts(timestep_bins=num_bins)
    if num_bins > NUM_TIMESTEPS:
        raise GraftError(
            f"timestep_bins={num_bins}: there are {NUM_TIMESTEPS} timesteps; give at most that many"
        )
    edges = [-(-NUM_TIMESTEPS * number // num_bins) for number in range(num_bins + 1)]
    return [[first, last - 1] for first, last in pairwise(edges)]


def bin_of(t: Tensor, num_bins: int) -> Tensor:
    """The bin of each timestep [B], as `bin_edges` cuts them."""
    return t * num_bins // NUM_TIMESTEPS


def check_finite(x: Tensor, path: str) -> None:
    """Raise GraftError where activations are not finite: their statistics would say nothing."""
    if not torch.isfinite(x).all():
        raise GraftError(
            f"activations at {path} are not finite; use --dtype float32, or a model that computes in it"
        )

"""Hyena's filters and gates where a faster form than the plain one is at hand: Triton on CUDA, pieces on CPUs.

Axes: B batch, N tokens, D width, K taps.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Optional

import torch
from torch import Tensor

from grafting.kernels import filter_pieces, pieces

MAX_TAPS = 8  # of the Triton kernel, whose backward pass is unrolled K times K times
TRITON = importlib.util.find_spec("triton") is not None


def available(u: Tensor, weight: Tensor | None, inner: Tensor | None) -> bool:
    """Whether `gates` is for a projection u [B, N, 3D] and these filters; else the plain form has to do."""
    if any(filter_ is not None and filter_.device != u.device for filter_ in (weight, inner)):
        return False  # weights that come for their own module's pass alone: sequential CPU offload
    if u.device.type == "cuda":
        taps = max(filter_.shape[-1] for filter_ in (weight, inner) if filter_ is not None)
        real = torch.compiler.is_compiling() or type(u) in (Tensor, torch.nn.Parameter)
        if not (TRITON and real and taps <= MAX_TAPS):
            return False
        from grafting.kernels import trusted

        return trusted.gates_are(u.device, u.dtype, taps, weight is not None, inner is not None)
    return weight is not None and inner is None and pieces.available(u)


def gates(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, inner: Tensor | None, shift: Tensor | None
) -> Tensor:
    """q * inner(k * v) with q, k, v = featurizer(u): u [B, N, 3D] -> [B, N, D].

    Featurizer `weight` [3D, 1, K] and `bias` [3D], inner filter `inner` [D, 1, K] and `shift` [D], or None.
    """
    if u.device.type == "cpu" and weight is not None and bias is not None and inner is None:
        return filter_pieces.gated_filter(u, weight, bias)
    return fused(u, weight, bias, inner, shift)


def plain(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, inner: Tensor | None, shift: Tensor | None
) -> Tensor:
    """The same by the plain path."""
    from grafting.operators.filters import causal_filter

    if weight is not None and bias is not None:
        u = causal_filter(u, weight, bias)
    q, k, v = u.chunk(3, dim=-1)
    gated = k * v
    if inner is not None and shift is not None:
        gated = causal_filter(gated, inner, shift)
    return q * gated


@torch.library.custom_op("grafting::gates", mutates_args=())
def fused(
    u: Tensor,
    weight: Optional[Tensor],  # noqa: UP045 - a schema is read off these
    bias: Optional[Tensor],  # noqa: UP045
    inner: Optional[Tensor],  # noqa: UP045
    shift: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    """`gates` in one kernel forward and one backward; opaque to torch.compile. Needs Triton."""
    from grafting.kernels import triton_gates

    with torch.cuda.device_of(u):  # Triton launches on the current device, which cuda:1 need not be
        return triton_gates.forward(u.contiguous(), weight, bias, inner, shift)


@fused.register_fake
def _fused_shape(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(*u.shape[:-1], u.shape[-1] // 3)


@torch.library.custom_op("grafting::gates_backward", mutates_args=())
def _fused_backward(
    u: Tensor,
    weight: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    inner: Optional[Tensor],  # noqa: UP045
    shift: Optional[Tensor],  # noqa: UP045
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    from grafting.kernels import triton_gates

    with torch.cuda.device_of(u):
        return triton_gates.backward(u.contiguous(), weight, bias, inner, shift, gradient.contiguous())


@_fused_backward.register_fake
def _fused_backward_shape(
    u: Tensor, weight: Tensor | None, bias: Any, inner: Tensor | None, shift: Any, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    given = weight if weight is not None else inner
    shape = (3 * (weight is not None) + (inner is not None), 1 if given is None else given.shape[-1])
    sums = u.new_empty(shape[0], shape[1] + 1, gradient.shape[-1], dtype=torch.float32)
    return torch.empty_like(u, memory_format=torch.contiguous_format), sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    u, weight, bias, inner, shift = ctx.saved_tensors
    grad_u, sums = _fused_backward(u, weight, bias, inner, shift, gradient)
    found: list[Tensor | None] = [grad_u]
    for filter_, constant, parts in ((weight, bias, sums[:3]), (inner, shift, sums[-1:])):
        if filter_ is None or constant is None:
            found += [None, None]
            continue
        taps = parts[:, :-1].transpose(1, 2).reshape(filter_.shape)  # [parts, K, D] -> [parts D, 1, K]
        found += [taps.to(filter_.dtype), parts[:, -1].reshape(constant.shape).to(constant.dtype)]
    return tuple(found)


fused.register_autograd(_gradients, setup_context=_keep)

"""Whether a fast path's numbers are right on a device, as a constant to torch.compile.

Importing this loads the compiler (a second), so that it is imported where a fast path is about to be taken.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from grafting.kernels import band, gates
from grafting.kernels.self_check import agrees, normals

CHECKED = (2, 300, 136)  # B, N, D of the check at first use: several programs in each direction


@torch.compiler.assume_constant_result
def gates_are(device: torch.device, dtype: torch.dtype, taps: int, featurizer: bool, inner: bool) -> bool:
    """Whether the kernel's numbers are right on this device; tried once."""
    return _check_gates(device, dtype, taps, featurizer, inner)


@cache
def _check_gates(device: torch.device, dtype: torch.dtype, taps: int, featurizer: bool, inner: bool) -> bool:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    batch, tokens, dim = CHECKED
    shapes = [(3 * dim, 1, taps), (3 * dim,)] * featurizer + [(dim, 1, taps), (dim,)] * inner

    def called(form: Any) -> Any:
        def call(u: Tensor, *filters: Tensor) -> Tensor:
            weight, bias = filters[:2] if featurizer else (None, None)
            own, shift = filters[-2:] if inner else (None, None)
            return form(u, weight, bias, own, shift)

        return call

    inputs = normals(device, dtype, (batch, tokens, 3 * dim), *shapes)
    return agrees("the Triton kernel of Hyena's gates", called(gates.fused), called(gates.plain), inputs)


@torch.compiler.assume_constant_result
def band_is(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether FlexAttention's numbers are right on this device; tried once."""
    return _check_band(device, dtype, width)


@cache
def _check_band(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    from grafting.operators.attention import blocked_window_attention

    shape = (1, 2, 2 * band.BLOCK + 37, width)
    return agrees(
        "FlexAttention for attention in a window",
        lambda q, k, v: band.attention(q, k, v, 4),
        lambda q, k, v: blocked_window_attention(q, k, v, 4),
        normals(device, dtype, shape, shape, shape),
    )

"""Mamba-2 on CUDA by what is installed: `mamba-ssm` or `flash-linear-attention`, and `causal-conv1d`.

Each is tried against the plain path at its first use; one that is absent, fails or is off is passed over.
Axes: B batch, N tokens, H heads, P head width, S state size, C channels, K taps.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from grafting.kernels.self_check import agrees, normals

CHUNK = 256  # tokens that a library's kernels handle at once
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.compiler.disable
def _mamba_ssm(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    result: Tensor = mamba_chunk_scan_combined(x, dt, a, b[:, :, None], c[:, :, None], CHUNK, D=d)
    return result


@torch.compiler.disable
def _flash_linear_attention(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    heads = x.shape[2]
    query, key = (t[:, :, None].expand(-1, -1, heads, -1).contiguous() for t in (c, b))
    value = x * dt[..., None].to(x.dtype)
    result: Tensor = chunk_simple_gla(query, key, value, g=dt * a, scale=1.0)[0]
    return result + x * d[:, None].to(x.dtype)


# Top-level module that it needs, what messages call it, the scan.
SCANS: tuple[tuple[str, str, Scan], ...] = (
    ("mamba_ssm", "mamba-ssm", _mamba_ssm),
    ("fla", "flash-linear-attention", _flash_linear_attention),
)


def scan_for(x: Tensor, state: int) -> Scan | None:
    """The scan y = ssd(x, dt, dt a, b, c) + d x of an installed library for x [B, N, H, P], or None.

    It takes x [B, N, H, P], dt [B, N, H] and a [H] in fp32, b and c [B, N, S], d [H].
    """
    if x.device.type != "cuda" or not (torch.compiler.is_compiling() or type(x) is Tensor):
        return None
    number = _first_trusted(x.device, x.dtype, x.shape[3], state)
    return None if number < 0 else SCANS[number][2]


@torch.compiler.assume_constant_result
def _first_trusted(device: torch.device, dtype: torch.dtype, width: int, state: int) -> int:
    """Place in `SCANS` of the first library whose numbers are right, -1 for none."""
    return _first_right(device, dtype, width, state)


@cache
def _first_right(device: torch.device, dtype: torch.dtype, width: int, state: int) -> int:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return -1
    for number, (module, name, scan) in enumerate(SCANS):
        if importlib.util.find_spec(module) is not None and _is_right(
            name, scan, device, dtype, width, state
        ):
            return number
    return -1


def _is_right(
    name: str, scan: Scan, device: torch.device, dtype: torch.dtype, width: int, state: int
) -> bool:
    from grafting.operators.ssd import ssd

    heads, tokens = 8, CHUNK + 44
    inputs = normals(
        device, dtype, (1, tokens, heads, width), (1, tokens, state), (1, tokens, state), (heads,)
    )
    (steps,) = normals(device, torch.float32, (1, tokens, heads))
    dt, a = F.softplus(steps - 3), -torch.linspace(1, 16, heads, device=device)

    def plain(x: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ssd(x, dt, dt * a, b, c, 64) + x * d[:, None]

    return agrees(
        f"{name}'s scan for mamba2", lambda x, b, c, d: scan(x, dt, a, b, c, d.float()), plain, inputs
    )


def filter_silu_for(x: Tensor, taps: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """SiLU of a causal depthwise filter by `causal-conv1d` for x [B, N, C], or None.

    It takes x, weight [C, 1, K] and bias [C].
    """
    real = torch.compiler.is_compiling() or type(x) is Tensor
    if x.device.type != "cuda" or not real or not 2 <= taps <= 4 or x.shape[2] % 8:
        return None
    return _causal_conv1d if _conv_trusted(x.device, x.dtype, taps) else None


@torch.compiler.disable
def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    if any(stride % 8 for stride in x.stride()[:2]):  # what its kernel for channels last needs
        x = x.contiguous()
    filtered: Tensor = causal_conv1d_fn(
        x.transpose(1, 2), weight[:, 0].to(x.dtype), bias.to(x.dtype), activation="silu"
    )
    return filtered.transpose(1, 2)


@torch.compiler.assume_constant_result
def _conv_trusted(device: torch.device, dtype: torch.dtype, taps: int) -> bool:
    return _conv_is_right(device, dtype, taps)


@cache
def _conv_is_right(device: torch.device, dtype: torch.dtype, taps: int) -> bool:
    if importlib.util.find_spec("causal_conv1d") is None or dtype not in (
        torch.float32, torch.bfloat16, torch.float16,
    ):  # fmt: skip
        return False
    from grafting.operators.filters import causal_filter

    return agrees(
        "causal-conv1d",
        _causal_conv1d,
        lambda x, weight, bias: F.silu(causal_filter(x, weight, bias)),
        normals(device, dtype, (2, 37, 48), (48, 1, taps), (48,)),
    )

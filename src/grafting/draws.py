"""Random draws as pure functions of (seed, purpose, index): no hidden state, so nothing to restore on resume.

Every sample of a run has a global index; its timestep, noise, label drop and so on are read off a counter-based
generator (the SplitMix64 finaliser, Steele et al. 2014, over key + counter). The draws of index i are the same
for any batch size, number of processes and device; only the rounding of `log` and `cos` may differ.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(seed: int, purpose: str) -> int:
    """A signed 64-bit key for one purpose of one seed."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64 finaliser on int64 tensors (wrapping products, logical shifts)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _bits(seed: int, purpose: str, index: Tensor, count: int) -> Tensor:
    """[B] global indices -> [B, count] random 64-bit integers."""
    stream = _mix(index.to(torch.int64) * _GOLDEN + key(seed, purpose))  # [B]
    counter = torch.arange(1, count + 1, device=index.device, dtype=torch.int64) * _GOLDEN  # [count]
    return _mix(stream[:, None] + counter[None, :])


def _unit(bits: Tensor) -> Tensor:
    """The upper 24 of 32 bits -> float32 in the open interval (0, 1)."""
    unit = (((bits >> 8) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24
    return unit.clamp_max(1 - 2.0**-24)  # float32 rounds the last of them up to 1


def uniform(seed: int, purpose: str, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """float32 [B, *shape] in (0, 1) for global indices `index` [B]."""
    return _unit(_bits(seed, purpose, index, math.prod(shape))).reshape(len(index), *shape)


def integers(seed: int, purpose: str, index: Tensor, high: int) -> Tensor:
    """int64 [B] in [0, high) for global indices `index` [B]; `high` up to 2**31."""
    return ((_bits(seed, purpose, index, 1)[:, 0] >> 16) & 0xFFFFFFFF) * high >> 32


def spread_integers(seed: int, purpose: str, index: Tensor, high: int) -> Tensor:
    """int64 [B] in [0, high) that any run of consecutive indices spreads evenly over it: the golden-ratio sequence.

    Uniform over indices like `integers`, but far from the neighbours'. `high` up to 2**31.
    """
    start = int(uniform(seed, purpose, torch.zeros(1, dtype=torch.int64)).item() * 2.0**32)  # exact: 25 bits
    words = (index.to(torch.int64) * _GOLDEN >> 32) & 0xFFFFFFFF
    return ((words + start) & 0xFFFFFFFF) * high >> 32


def normal(seed: int, purpose: str, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32 standard normals [B, *shape] for global indices `index` [B] (Box-Muller, tails to 5.9 sigma)."""
    count = math.prod(shape)
    bits = _bits(seed, purpose, index, (count + 1) // 2)  # one 64-bit word gives two normals
    radius = torch.sqrt(-2.0 * torch.log(_unit(bits)))
    angle = (2.0 * math.pi) * _unit(bits >> 32)
    pair = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pair[:, :count].reshape(len(index), *shape)


def permutation(seed: int, purpose: str, epoch: int, length: int) -> Tensor:
    """int64 [length]: the order in which epoch `epoch` visits `length` items."""
    words = _bits(seed, f"{purpose}/{epoch}", torch.zeros(1, dtype=torch.int64), length)[0]
    return torch.argsort(words, stable=True)


def torch_seed(seed: int, purpose: str) -> int:
    """A seed for torch's own generators, for code that draws from them (weight initialisation)."""
    return key(seed, purpose) & 0x7FFFFFFFFFFFFFFF

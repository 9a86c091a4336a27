"""How large the pieces are that paths for CPUs go over a tensor by, so that their passes stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 1 << 19  # of one piece: a fraction of a core's second-level cache


def available(x: Tensor) -> bool:
    """Whether paths by pieces are for such a tensor."""
    return x.device.type == "cpu" and x.is_floating_point() and not torch.compiler.is_compiling()


def size_of(x: Tensor, whole: int) -> int:
    """Bytes of a piece where all of them have `whole`: of a stand-in without values few tell as much as many."""
    return BYTES if type(x) in (Tensor, torch.nn.Parameter) else max(BYTES, whole // 8)

"""Muon (https://kellerjordan.github.io/posts/muon) with its products in a type that the device multiplies fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grafting.training.compute import multiplies_bf16_fast


class Muon(torch.optim.Muon):
    """torch.optim.Muon, of the same settings, steps and state, but for the type of the Newton-Schulz iteration.

    PyTorch's rounds to bfloat16 everywhere. A CPU without bf16 matrix units takes some ten times as long for that as
    for float32, which is more than a whole forward and backward pass of a small model.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            fast = multiplies_bf16_fast(group["params"][0].device)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = update.bfloat16() if fast else update.float()
                update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * _scale(group["adjust_lr_fn"], parameter))
        return loss


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """A matrix [m, n] with all singular values moved near 1 by a quintic Newton-Schulz iteration, in its own type."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _scale(adjust: str | None, parameter: Tensor) -> float:
    """What the learning rate is multiplied by: to the size of AdamW's steps, or by the shape alone."""
    rows, columns = parameter.shape
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))

"""The start of a new operator: random, copied from the donor, and its readout fitted in closed form.

Axes: B batch, N tokens, D width, F features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from grafting.families import Tap
from grafting.operators import Operator


@torch.no_grad()
def fit_readout(operator: nn.Module, taps: Iterable[Tap], ridge: float, device: torch.device) -> bool:
    """Set the operator's last linear layer to the ridge least-squares solution on calibration taps.

    Minimises sum ||W z + b - y||^2 + lambda ||W - W0||^2 over tokens, z = mix(x) [B, N, F], y the donor's output,
    W0 the layer as it is; lambda = ridge * mean diagonal of the normal matrix. Returns False, and changes nothing,
    for an operator without a readout or where the system is not finite.
    """
    if not isinstance(operator, Operator):
        return False
    readout = operator.readout
    features, width = readout.in_features, readout.out_features
    double = torch.float32 if device.type == "mps" else torch.float64
    normal = torch.zeros(features + 1, features + 1, dtype=double, device=device)
    target = torch.zeros(features + 1, width, dtype=double, device=device)
    for tap in taps:
        z = operator.mix(tap.input.to(readout.weight.dtype)).reshape(-1, features).to(double)
        if readout.bias is not None:
            z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        else:
            z = torch.cat([z, torch.zeros_like(z[:, :1])], dim=1)
        residual = tap.output.reshape(-1, width).to(double) - readout(z[:, :-1].to(readout.weight.dtype)).to(
            double
        )
        normal = torch.addmm(normal, z.T, z)
        target = torch.addmm(target, z.T, residual)
    scale = normal.diagonal()[:-1].mean()
    damping = torch.full((features + 1,), float(ridge), dtype=double, device=device) * scale
    damping[-1] = 0 if readout.bias is not None else 1.0
    try:
        update = torch.linalg.solve(normal + torch.diag(damping + 1e-12 * scale), target)
    except torch.linalg.LinAlgError:
        return False
    if not torch.isfinite(update).all():
        return False
    readout.weight += update[:-1].T.to(readout.weight.dtype)
    if readout.bias is not None:
        readout.bias.add_(update[-1].to(readout.bias.dtype))
    return True


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over mean absolute target: scale-free, so that layers can be compared."""
    return (output.float() - target.float()).abs().mean() / target.float().abs().mean().clamp(min=1e-12)

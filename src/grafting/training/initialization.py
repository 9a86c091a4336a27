"""The start of a new operator: random, copied from the donor, and its readout fitted in closed form.

Axes: B batch, N tokens, D width, F features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from grafting.families import Tap
from grafting.models.groups import BlockGroup
from grafting.operators import Operator


def run_on(module: nn.Module, tap: Tap) -> Tensor:
    """What an operator, or a group of blocks, makes of the input of a tap: [B, N, D]."""
    return module(tap.input) if tap.cond is None else module(tap.input, tap.cond)


class ReadoutFit:
    """Ridge least squares of an operator's last linear layer, tap by tap: memory does not grow with their number.

    Minimises sum ||W z + b - y||^2 + lambda ||W - W0||^2 over tokens, z = mix(x) [B, N, F], y the donor's output,
    W0 the layer as it is; lambda = ridge * mean diagonal of the normal matrix. Of a group of blocks the layer is the
    merge, and y the output of the blocks in sequence (less the input, where the merge is of residual updates).
    """

    def __init__(self, operator: Operator | BlockGroup, device: torch.device) -> None:
        self.operator, readout = operator, operator.readout
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        size = readout.in_features + 1
        self.normal = torch.zeros(size, size, dtype=self.wide, device=device)
        self.target = torch.zeros(size, readout.out_features, dtype=self.wide, device=device)

    @staticmethod
    def num_bytes(operator: Operator | BlockGroup) -> int:
        """What the normal equations of an operator take, in float64."""
        size = operator.readout.in_features + 1
        return 8 * size * (size + operator.readout.out_features)

    @torch.no_grad()
    def add(self, tap: Tap) -> None:
        """Take in the tokens of one tap."""
        readout = self.operator.readout
        x = tap.input.to(readout.weight.dtype)
        if isinstance(self.operator, BlockGroup):
            assert tap.cond is not None
            features = self.operator.mix(x, tap.cond.to(x.dtype))
            made = self.operator.finish(features, x)
        else:
            features = self.operator.mix(x)
            made = readout(features)
        features = features.reshape(-1, readout.in_features)
        residual = (tap.output.to(self.wide) - made.to(self.wide)).reshape(-1, readout.out_features)
        last = torch.full_like(features[:, :1], 1.0 if readout.bias is not None else 0.0)
        z = torch.cat([features, last], dim=1).to(self.wide)
        self.normal = torch.addmm(self.normal, z.T, z)
        self.target = torch.addmm(self.target, z.T, residual)

    @torch.no_grad()
    def solve(self, ridge: float) -> bool:
        """Set the layer to the solution; False, and nothing changes, where the system is not finite."""
        readout = self.operator.readout
        scale = self.normal.diagonal()[:-1].mean()
        damping = torch.full_like(self.normal[0], float(ridge)) * scale
        damping[-1] = 0 if readout.bias is not None else 1.0
        try:
            update = torch.linalg.solve(self.normal + torch.diag(damping + 1e-12 * scale), self.target)
        except torch.linalg.LinAlgError:
            return False
        if not torch.isfinite(update).all():
            return False
        readout.weight.add_(update[:-1].T.to(readout.weight.dtype))
        if readout.bias is not None:
            readout.bias.add_(update[-1].to(readout.bias.dtype))
        return True


def fit_readout(operator: nn.Module, taps: Iterable[Tap], ridge: float, device: torch.device) -> bool:
    """`ReadoutFit` on some taps; False for an operator without a readout."""
    if not isinstance(operator, (Operator, BlockGroup)):
        return False
    fit = ReadoutFit(operator, device)
    for tap in taps:
        fit.add(tap)
    return fit.solve(ridge)


class RelativeError:
    """Sums of the absolute error and the absolute target, part by part; their ratio is the relative error.

    Scale-free, so that layers can be compared. `sums` [2]: of both, per element, over the samples taken in, of which a
    process among several may have none.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)

    def add(self, output: Tensor, target: Tensor) -> None:
        """Take in a part of the samples."""
        output, target = output.float(), target.float()
        both = torch.stack([(output - target).abs().mean(), target.abs().mean()])
        self.sums = self.sums.to(target.device) + len(target) * both

"""Statistics of activations that are never all held: moments, extremes, tails, the channels that own the energy.

The data is passed over twice: sums of powers first, then what needs them (tails relative to each channel's mean and
deviation). Axes: B batch, N tokens, D channels, T timestep bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

NEAR = 0.1
"""Half width, in deviations, of the window in which the density at the mean is counted."""

_SHIFT = 15  # |x| is counted by its exponent and 8 bits of its mantissa: bins of 0.2 to 0.4 %
_BINS = (0x7F800000 >> _SHIFT) + 1  # of a float32, up to infinity
_TOP = 5

Passes = Callable[[], Iterable[tuple[Tensor, Mapping[str, Tensor]]]]
"""Gives, at every call anew, batches of (timestep bins [B], name -> activations [B, N, D])."""


class Moments:
    """Sums of x, x^2, x^3, x^4 in float64: per channel over everything, and per timestep bin over all channels."""

    def __init__(self, num_channels: int, num_bins: int) -> None:
        self.powers = torch.zeros(4, num_channels, dtype=torch.float64)
        self.bins = torch.zeros(num_bins, 5, dtype=torch.float64)  # count and the four sums
        self.count = 0  # of tokens
        self.largest = 0.0

    def add(self, x: Tensor, bins: Tensor) -> None:
        """One batch: x [B, N, D], its timestep bins [B]."""
        x = _wide(x)
        self.count += x.shape[0] * x.shape[1]
        self.largest = max(self.largest, x.abs().max().item())
        rows = torch.empty(len(x), 5, dtype=torch.float64)
        rows[:, 0] = x.shape[1] * x.shape[2]
        power = x
        for order in range(4):
            by_channel = power.sum(dim=1)  # [B, D]
            self.powers[order] += by_channel.sum(dim=0).cpu()
            rows[:, order + 1] = by_channel.sum(dim=1).cpu()
            power = power * x
        self.bins.index_add_(0, bins.cpu(), rows)

    @property
    def mean(self) -> Tensor:
        """Per channel: [D]."""
        return self.powers[0] / self.count

    @property
    def variance(self) -> Tensor:
        """Per channel: [D]."""
        return (self.powers[1] / self.count - self.mean.square()).clamp(min=0.0)

    def summary(self) -> dict[str, Any]:
        """Moments over all values, per channel, and per timestep bin (None: empty, or constant)."""
        pooled = self.powers.sum(dim=1) / (self.count * self.powers.shape[1])
        mean, variance, kurtosis = _central(pooled)
        by_channel = [k for _, _, k in map(_central, (self.powers / self.count).unbind(1)) if k is not None]
        energy = self.powers[1] / self.powers[1].sum().clamp(min=1e-300)
        share, channel = energy.topk(min(_TOP, len(energy)))
        in_bins = [_central(row[1:] / row[0]) if row[0] > 0 else None for row in self.bins]
        return {
            "mean": mean, "variance": variance, "kurtosis": kurtosis,
            "channel_kurtosis": torch.tensor(by_channel).median().item() if by_channel else None,
            "max_abs": self.largest,
            "channels": [{"channel": c, "share": s} for c, s in zip(channel.tolist(), share.tolist(), strict=True)],
            "timesteps": {
                "variance": [found[1] if found else None for found in in_bins],
                "kurtosis": [found[2] if found else None for found in in_bins],
            },
        }  # fmt: skip


class Tails:
    """The second pass: the density at each channel's mean, and a quantile of |x|."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.near = self.counted = 0
        self.histogram = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """One batch x [B, N, D] of those that `moments` saw."""
        x = x.detach().float().contiguous()
        mean, deviation = (
            self.moments.mean.float().to(x.device),
            self.moments.variance.sqrt().float().to(x.device),
        )
        alive = deviation > 1e-6 * self.moments.largest
        self.near += int(((x - mean).abs() < torch.where(alive, NEAR * deviation, 0.0)).sum())
        self.counted += x.shape[0] * x.shape[1] * int(alive.sum())
        place = (x.abs().view(torch.int32) >> _SHIFT).flatten()
        self.histogram += torch.bincount(place, minlength=_BINS).cpu()

    @property
    def efficiency(self) -> float | None:
        """(2 f sigma)^2, f the density at the mean: how efficient the median is against the mean; None: constant."""
        return (self.near / self.counted / NEAR) ** 2 if self.counted else None

    def quantile(self, share: float) -> float:
        """The value below which that share of |x| lies, to the width of a bin (0.4 %)."""
        reached = self.histogram.cumsum(0) >= share * self.histogram.sum()
        upper = torch.tensor((int(reached.nonzero()[0]) + 1) << _SHIFT, dtype=torch.int32)
        return min(upper.view(torch.float32).item(), self.moments.largest)


def describe(passes: Passes, num_bins: int = 1) -> dict[str, dict[str, Any]]:
    """What every activation that `passes` names is like; it is called twice.

    Per name: mean, variance, excess kurtosis (over all values; `channel_kurtosis`: the median over channels), the
    largest |x| and the 99.9 % quantile of |x| (`q999`), the channels of largest energy with their shares, variance and
    excess kurtosis per timestep bin, and `median_efficiency` (see `grafting.analysis.regression`).
    """
    moments: dict[str, Moments] = {}
    for bins, batch in passes():
        for name, x in batch.items():
            moments.setdefault(name, Moments(x.shape[-1], num_bins)).add(x, bins)
    tails = {name: Tails(found) for name, found in moments.items()}
    for _, batch in passes():
        for name, x in batch.items():
            tails[name].add(x)
    return {
        name: found.summary()
        | {"q999": tails[name].quantile(0.999), "median_efficiency": tails[name].efficiency}
        for name, found in moments.items()
    }


def _central(raw: Tensor) -> tuple[float, float, float | None]:
    """Raw moments of order 1 to 4 -> mean, variance, excess kurtosis (None where the variance is 0)."""
    first, second, third, fourth = raw.tolist()
    variance = max(0.0, second - first**2)
    if variance <= 1e-12 * second or second == 0:
        return first, variance, None
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return first, variance, central / variance**2 - 3


def _wide(x: Tensor) -> Tensor:
    """In float64, which not every accelerator has."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()

"""Causal depthwise filters of a few taps, along tokens or along channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafting.kernels import filter_pieces, pieces

# Up to this many taps, shifted multiply-adds in the layout [B, N, D] beat `conv1d` and its two
# transposes (2 to 3 times at 4 taps on a CPU); beyond it the passes over memory add up.
MAX_SHIFTED_TAPS = 16


def causal_filter(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y[b, n, d] = bias[d] + sum_j weight[d, 0, K - 1 - j] x[b, n - j, d], with x zero before the start.

    x [B, N, D], weight [D, 1, K] as `nn.Conv1d` stores it (last tap: the token itself), bias [D].
    """
    num_tokens, taps = x.shape[1], weight.shape[-1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if taps > MAX_SHIFTED_TAPS:
        y = F.conv1d(
            x.transpose(1, 2), weight, bias, padding=taps - 1, groups=x.shape[2]
        )  # [B, D, N + K - 1]
        return y[..., :num_tokens].transpose(1, 2)
    padded = F.pad(x, (0, 0, taps - 1, 0))  # [B, N + K - 1, D]
    y = bias.expand_as(x)
    for tap in range(taps):
        y = torch.addcmul(y, padded.narrow(1, tap, num_tokens), weight[:, 0, tap])
    return y


def causal_channel_filter(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same along the channel axis with one filter per token: x [B, N, C], weight [N, 1, K], bias [N]."""
    num_channels, taps = x.shape[2], weight.shape[-1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if taps > MAX_SHIFTED_TAPS:
        y = F.conv1d(x, weight, bias, padding=taps - 1, groups=x.shape[1])
        return y[..., :num_channels]
    padded = F.pad(x, (taps - 1, 0))  # [B, N, C + K - 1]
    y = bias[:, None].expand_as(x)
    for tap in range(taps):
        y = torch.addcmul(y, padded.narrow(2, tap, num_channels), weight[:, :, tap])
    return y


class DepthwiseFilter(nn.Module):
    """Parameters of a depthwise filter, in the shapes and with the initialisation of `nn.Conv1d`.

    `identity=True` starts it as the identity instead: last tap 1, the others and the bias 0.
    """

    def __init__(self, channels: int, kernel_size: int, *, identity: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))
        if identity:
            self.set_identity()
        else:
            bound = kernel_size**-0.5
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def set_identity(self) -> None:
        """Make the filter pass its input through unchanged."""
        self.weight.zero_()
        self.weight[..., -1] = 1.0
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Filter x [B, N, D] along the tokens, causally."""
        if self._by_pieces(x):
            return filter_pieces.filtered(x, self.weight, self.bias)
        return causal_filter(x, self.weight, self.bias)

    def _by_pieces(self, x: Tensor) -> bool:
        here = self.weight.device == x.device  # not so under sequential CPU offload
        return here and self.weight.shape[-1] <= MAX_SHIFTED_TAPS and pieces.available(x)

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, kernel_size={self.weight.shape[-1]}"


class ChannelFilter(DepthwiseFilter):
    """One filter per token, along the channels: x [B, N, C] of exactly `channels` = N tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Filter x [B, N, C] along the channels, causally."""
        if self._by_pieces(x):
            return filter_pieces.filtered_along_channels(x, self.weight, self.bias)
        return causal_channel_filter(x, self.weight, self.bias)

"""How much attention falls within a band around the diagonal, without ever holding a whole map.

Axes: B batch, H heads, N tokens, d width of a head, K widths, Q queries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grafting.errors import GraftError

CACHED, LARGE = 2**19, 2**25
"""Attention scores held at a time, in float32: what a CPU's cache takes (2 MiB), and elsewhere 128 MiB."""


def band_mass(q: Tensor, k: Tensor, widths: Sequence[int], *, max_scores: int | None = None) -> Tensor:
    """L_k = 1/N sum_ij A_ij [|i - j| <= k] for every width k: float32 [K, B, H] (arXiv 2506.05340, section 4).

    q, k: [B, H, N, d], the map being A = softmax(q k^T / sqrt(d)) over all N keys. Blocks of queries meet all keys at
    once, in float32: at most `max_scores` scores, or one row of a sample's maps, so memory is linear in N.
    Raises GraftError for shapes that have no square map, and widths that are no band.
    """
    if q.ndim != 4 or q.shape != k.shape:
        raise GraftError(
            f"a band needs as many keys as queries: got queries {list(q.shape)} and keys {list(k.shape)}, "
            "expected both [B, H, N, d]"
        )
    batch, heads, num_tokens, width = q.shape
    check_widths(widths, num_tokens)
    keys = k.float().transpose(-2, -1)  # [B, H, d, N]
    limits = torch.tensor(list(widths), device=q.device).view(-1, 1, 1)
    widest = max(widths)
    if max_scores is None:
        max_scores = CACHED if q.device.type == "cpu" else LARGE
    samples, block = at_once(batch, heads, num_tokens, max_scores)
    total = torch.zeros(len(widths), batch * heads, device=q.device)
    for start in range(0, num_tokens, block):
        first, last = max(0, start - widest), min(num_tokens, start + block + widest)
        i = torch.arange(start, min(start + block, num_tokens), device=q.device).view(1, -1, 1)
        j = torch.arange(first, last, device=q.device).view(1, 1, -1)
        inside = ((i - j).abs() <= limits).float()  # [K, Q, band]
        for b in range(0, batch, samples):
            queries = q[b : b + samples, :, start : start + block].float() * width**-0.5
            weights = torch.matmul(queries, keys[b : b + samples]).softmax(dim=-1)  # [some of B, H, Q, N]
            band = weights[..., first:last].reshape(queries.shape[0] * heads, -1)
            # (an einsum over b, h, q, j is many times slower)
            total[:, b * heads : (b + samples) * heads] += torch.matmul(inside.flatten(1), band.t())
    return total.view(-1, batch, heads) / num_tokens


def at_once(batch: int, heads: int, num_tokens: int, max_scores: int) -> tuple[int, int]:
    """How many samples, and how many of their queries, have at most `max_scores` scores; at least one of both.

    Queries of one sample come before further samples: they share its keys, and a block of few is a slow product.
    """
    block = max(1, min(num_tokens, max_scores // (heads * num_tokens)))
    return max(1, min(batch, max_scores // (heads * num_tokens * block))), block


def uniform_mass(num_tokens: int, width: int) -> float:
    """L_k of a map that attends to all tokens alike: the share of pairs with |i - j| <= k."""
    width = min(width, num_tokens - 1)
    return (num_tokens * (2 * width + 1) - width * (width + 1)) / num_tokens**2


def default_width(num_tokens: int) -> int:
    """The paper's k: N / 8 (32 of 256 tokens), at least 1."""
    return max(1, num_tokens // 8)


def check_widths(widths: Sequence[int], num_tokens: int) -> None:
    """Raise GraftError unless there are band widths, each a whole number from 0 to N - 1, none twice."""
    if not widths:
        raise GraftError("no band width: give at least one k")
    for k in widths:
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < num_tokens:
            raise GraftError(
                f"band width k={k!r}: expected a whole number from 0 to {num_tokens - 1}, for {num_tokens} tokens"
            )
    if len(set(widths)) < len(widths):
        raise GraftError(f"band widths {list(widths)} name one twice; name each once")

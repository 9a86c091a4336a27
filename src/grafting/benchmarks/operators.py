"""Operators: each core against the plain published form, its growth with the number of tokens, and whole operators
against attention with the ceiling that the FLOPs set.

Axes: B batch, N tokens, D width, H heads, K taps.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafting import operators
from grafting.benchmarks.timing import (
    Work,
    as_dtype,
    ceilings,
    device_name,
    kept_memory,
    side_by_side,
    slope,
)
from grafting.errors import GraftError
from grafting.kernels import gates, installed
from grafting.operators.attention import split_heads, window_attention
from grafting.operators.filters import causal_filter
from grafting.operators.ssd import ssd

WINDOW, TAPS, STATE, HEAD = 4, 4, 64, 16  # of the published operators


@dataclass(frozen=True)
class Size:
    """The shape that an operator is timed at."""

    tokens: int
    width: int
    heads: int


SIZES = {
    "dit-fashion": Size(64, 128, 4),
    "XL/2-256": Size(256, 1152, 16),
    "XL/2-512": Size(1024, 1152, 16),
    "XL-4096": Size(4096, 1152, 16),
    "PixArt-2K": Size(16384, 1152, 16),
}
QUADRATIC_HEADS = 8  # heads are independent, and the N x N form of all does not fit: some are timed, for all


def bench_operators(
    *, size: str = "XL-4096", batch_size: int = 1, device: str = "cpu", dtype: str = "float32", repeats: int = 5,
    growth: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Cores (forward and backward) and whole operators at one size; `growth`: cores from 1,024 to 16,384 tokens too."""
    from grafting.loading import as_device
    from grafting.runs import environment

    if size not in SIZES:
        raise GraftError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
    kind, place = as_dtype(dtype), as_device(device)
    with kept_memory(place):
        bench = _Bench(SIZES[size], batch_size, place, kind, repeats)
        found: dict[str, Any] = {
            "benchmark": "operators", "size": size, **vars(bench.size), "batch_size": batch_size, "dtype": dtype,
            "device": device_name(place), "ceilings": bench.ceilings, "rows": [*bench.cores(), *bench.whole()],
        }  # fmt: skip
        if growth:
            found["growth"] = bench.growth()
    return {**found, "environment": environment()}


class _Bench:
    def __init__(
        self, size: Size, batch: int, device: torch.device, dtype: torch.dtype, repeats: int
    ) -> None:
        self.size, self.batch, self.device, self.dtype, self.repeats = size, batch, device, dtype, repeats
        self.ceilings = ceilings(device, dtype)

    def tensor(self, *shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype).requires_grad_(gradient)

    # ---- cores: what lies between an operator's projections

    def cores(self) -> list[dict[str, Any]]:
        """Ours against the plain published form, on equal inputs."""
        tokens = self.size.tokens
        rows = [
            self._row("hyena_x", "core", self._gates(tokens), "transpose and conv1d"),
            self._row("swa", "core", self._window(tokens), "SDPA with an N x N mask"),
            self._row("mamba2", "core", self._scan(tokens), "its N x N form"),
        ]
        return rows

    def growth(self) -> list[dict[str, Any]]:
        """Seconds of our cores (forward and backward) at 1,024 to 16,384 tokens, and the log-log slope."""
        rows = []
        for name, make in (("hyena_x", self._gates), ("swa", self._window), ("mamba2", self._scan)):
            sizes, seconds = [1024, 2048, 4096, 8192, 16384], list[float]()
            moved = list[int]()
            for tokens in sizes:
                ours = make(tokens)[0]
                work = _both_ways(ours)
                seconds.append(
                    side_by_side({"ours": work}, self.device, repeats=self.repeats)["ours"]["median_s"]
                )
                moved.append(3 * sum(t.nbytes for t in ours.inputs) + 2 * ours.forward().nbytes)
            peak = self.ceilings["copy_bytes_per_s"]
            shares = [size / time / peak for size, time in zip(moved, seconds, strict=True)]
            rows.append({
                "operator": name, "tokens": sizes, "seconds": seconds, "slope": slope(sizes, seconds),
                "share_of_copy": shares,
            })  # fmt: skip
        return rows

    def _gates(self, tokens: int) -> tuple[Form, Form]:
        width = self.size.width
        u, weight, bias = (
            self.tensor(self.batch, tokens, 3 * width), self.tensor(3 * width, 1, TAPS), self.tensor(3 * width)
        )  # fmt: skip

        def ours() -> Tensor:
            if gates.available(u, weight, None):
                return gates.gates(u, weight, bias, None, None)
            q, k, v = causal_filter(u, weight, bias).chunk(3, dim=-1)
            return q * k * v

        def published() -> Tensor:
            filtered = F.conv1d(u.transpose(1, 2), weight, bias, padding=TAPS - 1, groups=3 * width)
            q, k, v = filtered[..., :tokens].transpose(1, 2).chunk(3, dim=-1)
            return q * k * v

        return Form(ours, (u, weight, bias)), Form(published, (u, weight, bias))

    def _window(self, tokens: int) -> tuple[Form, Form]:
        qkv = self.tensor(self.batch, tokens, 3 * self.size.width)
        position = torch.arange(tokens, device=self.device)

        def ours() -> Tensor:
            return window_attention(*split_heads(qkv, self.size.heads), WINDOW)

        def masked() -> Tensor:
            mask = (position[:, None] - position[None, :]).abs() <= WINDOW
            return F.scaled_dot_product_attention(*split_heads(qkv, self.size.heads), attn_mask=mask)

        return Form(ours, (qkv,)), Form(masked, (qkv,))

    def _scan(self, tokens: int) -> tuple[Form, Form]:
        inner = 2 * self.size.width
        heads = max(1, inner // HEAD)
        x = self.tensor(self.batch, tokens, heads, HEAD)
        b, c = (self.tensor(self.batch, tokens, STATE) for _ in range(2))
        dt = torch.rand(self.batch, tokens, heads, device=self.device) * 0.1
        rate = -torch.ones(heads, device=self.device)
        nothing = torch.zeros(heads, device=self.device)
        some = min(heads, QUADRATIC_HEADS)
        few = x[:, :, :some].detach().clone().requires_grad_()

        def ours() -> Tensor:
            scan = installed.scan_for(x, STATE)
            return ssd(x, dt, dt * rate, b, c, 64) if scan is None else scan(x, dt, rate, b, c, nothing)

        def quadratic() -> Tensor:  # one chunk: the N x N form of the same sums
            return ssd(few, dt[:, :, :some], (dt * rate)[:, :, :some], b, c, tokens)

        return Form(ours, (x, b, c)), Form(quadratic, (few, b, c), heads / some)

    def _row(self, operator: str, part: str, forms: tuple[Form, Form], baseline: str) -> dict[str, Any]:
        ours, theirs = forms
        with torch.no_grad():
            mine, right = ours.forward(), theirs.forward()
            error = (mine[:, :, : right.shape[2]] - right).abs().max().item()
        # Forward reads the inputs and writes the output; backward reads both gradients' sides and writes the inputs'.
        moved = 3 * sum(t.nbytes for t in ours.inputs) + 2 * mine.nbytes
        del mine, right
        found = side_by_side(
            {"ours": _both_ways(ours), "baseline": _both_ways(theirs)}, self.device, repeats=self.repeats
        )
        seconds, base = found["ours"]["median_s"], theirs.times * found["baseline"]["median_s"]
        gc.collect()
        return {
            "operator": operator, "part": part, "baseline": baseline, "seconds": seconds, "baseline_seconds": base,
            "ratio": base / seconds, "max_difference": error,
            "bytes": moved, "share_of_copy": moved / seconds / self.ceilings["copy_bytes_per_s"],
        }  # fmt: skip

    # ---- whole operators against attention

    def whole(self) -> list[dict[str, Any]]:
        """Forward and backward of every mha operator, with the ratio that the FLOPs alone would allow."""
        names = ("mha", "swa", "hyena_x", "hyena_y", "hyena_se", "mamba2")
        rows: list[dict[str, Any]] = []
        for name in names:
            module, x = self._operator(name)
            found = side_by_side(
                {"ours": _both_ways(Form(lambda m=module, x=x: m(x), (x, *module.parameters())))},  # type: ignore[misc]
                self.device, repeats=self.repeats,
            )["ours"]["median_s"]  # fmt: skip
            cost = operators.cost_of(module, num_tokens=self.size.tokens, dim=self.size.width)
            flops = 3 * self.batch * cost.total
            rows.append({
                "operator": name, "part": "whole", "baseline": "mha", "seconds": found, "flops": flops,
                "share_of_matmul": flops / found / self.ceilings["matmul_flops_per_s"],
            })  # fmt: skip
            gc.collect()
        attention = rows[0]
        for row in rows:
            row["baseline_seconds"] = attention["seconds"]
            row["ratio"] = attention["seconds"] / row["seconds"]
            row["flop_ceiling"] = attention["flops"] / row["flops"]
        return rows

    def _operator(self, name: str) -> tuple[nn.Module, Tensor]:
        size = self.size
        module = operators.build(name, dim=size.width, num_heads=size.heads, num_tokens=size.tokens)
        return module.to(self.device, self.dtype), self.tensor(self.batch, size.tokens, size.width)


@dataclass(frozen=True)
class Form:
    """One way to compute something, and the tensors whose gradients belong to it."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    times: float = 1.0  # how many of these make up the whole


def _both_ways(form: Form) -> Work:
    """Forward and backward."""

    def work() -> None:
        output = form.forward()
        gradient = torch.ones((), device=output.device, dtype=output.dtype).expand_as(output) / math.sqrt(
            output.numel()
        )
        torch.autograd.grad(output, form.inputs, gradient)

    return work

"""Every fast path equals the plain path."""

from __future__ import annotations

import pytest
import torch

from grafting import operators
from grafting.kernels import gated_filter as kernel
from grafting.operators.filters import causal_filter

SHAPES = [(3, 7, 4, 4), (2, 2, 3, 4), (2, 5, 3, 1), (1, 9, 2, 12), (5, 16, 1, 3)]  # B, N, D, K


def plain(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    q, k, v = causal_filter(u, weight, bias).chunk(3, dim=-1)
    return q * k * v


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    b, n, d, k = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((b, n, 3 * d), (3 * d, 1, k), (3 * d,))
    return tuple(torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in sizes)


@pytest.mark.parametrize("piece_bytes", [64, 200, 1 << 19])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_filter_equals_the_plain_path(
    shape: tuple[int, int, int, int], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "PIECE_BYTES", piece_bytes)
    given = arguments(shape, torch.float64)
    fast, slow = kernel.gated_filter(*given), plain(*given)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weight = torch.randn(slow.shape, dtype=slow.dtype)
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), given),
                    torch.autograd.grad((slow * weight).sum(), given), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gated_filter_in_bf16_rounds_once() -> None:
    given = [t.detach().bfloat16() for t in arguments((2, 33, 8, 4), torch.float32)]
    exact = plain(*(t.double() for t in given))
    error = (kernel.gated_filter(*given).double() - exact).norm() / exact.norm()
    assert error < 2**-8


def test_compiling_and_meta_take_the_plain_path() -> None:
    with torch.device("meta"):
        operator = operators.build("hyena_x", dim=8)
        assert operator(torch.empty(1, 5, 8)).shape == (1, 5, 8)
    operator = operators.build("hyena_x", dim=8)
    x = torch.randn(2, 6, 8)
    compiled = torch.compile(operator, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), operator(x), rtol=1e-5, atol=1e-6)

"""Every fast path equals the plain path."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grafting import operators
from grafting.kernels import band, decayed, gates, installed, pieces, trusted
from grafting.kernels import filter_pieces as kernel
from grafting.kernels.self_check import agrees, normals
from grafting.operators import mamba2
from grafting.operators.attention import blocked_window_attention
from grafting.operators.filters import causal_channel_filter, causal_filter
from grafting.operators.ssd import ssd

SHAPES = [(3, 7, 4, 4), (2, 2, 3, 4), (2, 5, 3, 1), (1, 9, 2, 12), (5, 16, 1, 3)]  # B, N, D, K
KINDS = {"hyena_x": (True, False), "hyena_y": (False, True), "hyena_se": (True, True)}  # featurizer, inner
Forms = Callable[..., Tensor]
COMPILED = os.environ.get("TRITON_INTERPRET") == "0"
DEVICE = torch.device("cuda" if COMPILED else "cpu")


def plain(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    q, k, v = causal_filter(u, weight, bias).chunk(3, dim=-1)
    return q * k * v


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    b, n, d, k = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((b, n, 3 * d), (3 * d, 1, k), (3 * d,))
    return tuple(torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in sizes)


def compare(fast: Tensor, slow: Tensor, given: tuple[Tensor, ...]) -> None:
    """Values and gradients in float64."""
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weight = torch.randn(slow.shape, dtype=slow.dtype)
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), given),
                    torch.autograd.grad((slow * weight).sum(), given), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("piece_bytes", [64, 200, 1 << 19])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_filter_equals_the_plain_path(
    shape: tuple[int, int, int, int], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BYTES", piece_bytes)
    given = arguments(shape, torch.float64)
    compare(kernel.gated_filter(*given), plain(*given), given)


@pytest.mark.parametrize("piece_bytes", [64, 200, 1 << 19])
@pytest.mark.parametrize("shape", SHAPES)
def test_filter_in_pieces_equals_the_plain_path(
    shape: tuple[int, int, int, int], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BYTES", piece_bytes)
    given = arguments(shape, torch.float64)
    compare(kernel.filtered(*given), causal_filter(*given), given)


@pytest.mark.parametrize("piece_bytes", [64, 200, 1 << 19])
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_filter_in_pieces_equals_the_plain_path(
    shape: tuple[int, int, int, int], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BYTES", piece_bytes)
    b, n, d, k = shape
    given = tuple(
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((b, n, 3 * d), (n, 1, k), (n,))
    )
    compare(kernel.filtered_along_channels(*given), causal_channel_filter(*given), given)


def decayed_arguments(
    count: int, tokens: int, heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Running sums of log decays of up to 3 a token, scores, values."""
    draw = torch.Generator().manual_seed(0)
    steps = -3 * torch.rand(count, tokens, heads, generator=draw, dtype=torch.float64)
    scores = torch.randn(count, tokens, tokens, generator=draw, dtype=torch.float64)
    x = torch.randn(count, tokens, heads, width, generator=draw, dtype=torch.float64)
    return steps.cumsum(1).to(torch.promote_types(dtype, torch.float32)), scores.to(dtype), x.to(dtype)


def decayed_plainly(total: Tensor, scores: Tensor, x: Tensor) -> Tensor:
    """Term by term."""
    rows = []
    for i in range(x.shape[1]):
        decays = torch.exp(total[:, i : i + 1] - total[:, : i + 1])  # [M, j, H]
        rows.append(torch.einsum("mjh,mj,mjhp->mhp", decays, scores[:, i, : i + 1], x[:, : i + 1]))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("piece_bytes", [64, 3000, 1 << 19])
@pytest.mark.parametrize("shape", [(5, 7, 3, 4), (1, 1, 2, 3), (3, 16, 5, 2)])
def test_decayed_product_equals_the_sum_term_by_term(
    shape: tuple[int, int, int, int], piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "BYTES", piece_bytes)
    given = tuple(t.requires_grad_() for t in decayed_arguments(*shape, torch.float64))
    compare(decayed.decayed_product(*given), decayed_plainly(*given), given)


def test_decayed_product_in_bf16_rounds_weights_and_result_alone() -> None:
    total, scores, x = decayed_arguments(3, 33, 4, 8, torch.bfloat16)
    exact = decayed_plainly(total.double(), scores.double(), x.double())
    error = (decayed.decayed_product(total, scores, x).double() - exact).norm() / exact.norm()
    assert error < 2**-8


def test_a_second_backward_is_refused() -> None:
    """The gradients are computed in place, piece by piece, with no graph of their own."""
    gated = arguments((2, 5, 3, 4), torch.float64)
    along = (
        gated[0],
        *(t.requires_grad_() for t in (torch.randn(5, 1, 3).double(), torch.randn(5).double())),
    )
    product = tuple(t.requires_grad_() for t in decayed_arguments(2, 5, 3, 4, torch.float64))
    for function, given in (
        (kernel.gated_filter, gated), (kernel.filtered, gated), (kernel.filtered_along_channels, along),
        (decayed.decayed_product, product),
    ):  # fmt: skip
        (first,) = torch.autograd.grad(function(*given).square().sum(), given[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


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
    torch.compiler.reset()  # other tests' compiled code counts towards its limits
    compiled = torch.compile(operator, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), operator(x), rtol=1e-5, atol=1e-6)


# ---- the Triton kernel


@pytest.fixture
def triton() -> Any:
    """Triton's interpreter (see conftest.py); with TRITON_INTERPRET=0 the compiled kernel, which needs a GPU."""
    found = pytest.importorskip(
        "triton", reason="Triton is not installed; it comes with torch on CUDA, or `pip install triton`"
    )
    if not COMPILED and tuple(map(int, found.__version__.split(".")[:2])) < (3, 9):
        pytest.skip(
            f"the interpreter of Triton {found.__version__} fails with new versions of NumPy; 3.9 does not"
        )
    return found


def filters_of(kind: str, b: int, n: int, d: int, k: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    featurizer, inner = KINDS[kind]
    u, weight, bias, own, shift = normals(
        DEVICE, dtype, (b, n, 3 * d), (3 * d, 1, k), (3 * d,), (d, 1, k), (d,)
    )
    return (
        u,
        *((weight, bias) if featurizer else (None, None)),
        *((own, shift) if inner else (None, None)),
    )


def both_ways(form: Forms, given: tuple[Tensor | None, ...], weight: Tensor) -> list[Tensor]:
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in given]
    output = form(*leaves)
    present = [t for t in leaves if t is not None]
    return [output, *torch.autograd.grad(output, present, weight.to(output.dtype))]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("hyena_x", (2, 6, 5, 4)),
        ("hyena_x", (1, 3, 130, 4)),  # fewer tokens than taps, more channels than a tile
        ("hyena_y", (2, 6, 5, 4)),
        ("hyena_y", (1, 6, 70, 1)),
        ("hyena_se", (1, 5, 3, 2)),
        ("hyena_se", (2, 3, 4, 1)),
    ],
)
def test_the_triton_kernel_equals_the_plain_path(
    kind: str, shape: tuple[int, int, int, int], triton: Any
) -> None:
    given = filters_of(kind, *shape, torch.float32)
    weight = torch.randn(shape[0], shape[1], shape[2], device=DEVICE)
    found, right = both_ways(gates.fused, given, weight), both_ways(gates.plain, given, weight)
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_triton_kernel_adds_up_what_several_programs_find(
    triton: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grafting.kernels import triton_gates

    monkeypatch.setattr(triton_gates, "TOKENS_PER_PROGRAM", 4)
    given = filters_of("hyena_x", 1, 9, 3, 3, torch.float32)
    weight = torch.randn(1, 9, 3, device=DEVICE)
    found, right = both_ways(gates.fused, given, weight), both_ways(gates.plain, given, weight)
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hyena_x", "hyena_y"])
def test_the_triton_kernel_in_bf16_rounds_once(kind: str, triton: Any) -> None:
    given = filters_of(kind, 1, 7, 6, 3, torch.bfloat16)
    weight = torch.randn(1, 7, 6, device=DEVICE).bfloat16()
    found = both_ways(gates.fused, given, weight)
    exact = both_ways(gates.plain, tuple(t if t is None else t.double() for t in given), weight)
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        # The interpreter cuts off where a GPU rounds to the nearest.
        assert (mine.double() - right).norm() / right.norm() < 2 * 2**-8


def test_a_compiled_operator_calls_the_triton_kernel(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def available(u: Tensor, weight: Tensor | None, inner: Tensor | None) -> bool:
        return trusted.gates_are(u.device, u.dtype, 2, weight is not None, inner is not None)

    operator = operators.build("hyena_x", dim=4, kernel_size=2).to(DEVICE)
    x = torch.randn(1, 5, 4, device=DEVICE, requires_grad=True)
    right = operator(x)
    monkeypatch.setattr(gates, "available", available)
    monkeypatch.setattr(gates, "CHECKED", (1, 5, 4))
    monkeypatch.setattr(gates, "gates", gates.fused)

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        calls.append(any("gates" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(operator, backend=backend, fullgraph=True)
    found = compiled(x)
    assert calls == [True]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    mine, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, right))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_what_the_compiler_is_told_of_the_kernel_is_true(triton: Any) -> None:
    given = filters_of("hyena_se", 1, 5, 3, 2, torch.float32)
    leaves = tuple(t if t is None else t.requires_grad_() for t in given)
    torch.library.opcheck(gates.fused, leaves, test_utils=("test_schema", "test_faketensor"))


# ---- attention in a window by FlexAttention


@pytest.mark.parametrize(("tokens", "window"), [(300, 4), (256, 200), (129, 0), (700, 128)])
def test_the_block_mask_of_a_band_has_the_blocks_that_meet_it(tokens: int, window: int) -> None:
    mask = band.make_block_mask(tokens, window, torch.device("cpu"))
    i = torch.arange(tokens)
    near = (i[:, None] - i[None, :]).abs() <= window
    blocks = -(-tokens // band.BLOCK)
    padded = F.pad(near, (0, blocks * band.BLOCK - tokens) * 2)
    needed = padded.view(blocks, band.BLOCK, blocks, band.BLOCK).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)
    assert mask.seq_lengths == (tokens, tokens)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_in_a_band_equals_the_blocked_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(band, "_compiled", lambda: flex_attention)
    q, k, v = normals(torch.device("cpu"), torch.float32, *[(2, 3, 150, 8)] * 3)
    torch.testing.assert_close(band.attention(q, k, v, 5), blocked_window_attention(q, k, v, 5))


# ---- libraries that may be installed, by stand-ins


def scan_of_mamba_ssm(wrong: float) -> Any:
    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int, D: Tensor
    ) -> Tensor:
        return ssd(x, dt, dt * a, b[:, :, 0], c[:, :, 0], chunk_size) + (1 + wrong) * x * D[:, None]

    return mamba_chunk_scan_combined


def scan_of_fla(wrong: float) -> Any:
    def chunk_simple_gla(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        ones = torch.ones(v.shape[:3])
        return (scale + wrong) * ssd(v, ones, g, k[:, :, 0], q[:, :, 0], 32), None

    return chunk_simple_gla


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a stand-in for an installed library in place."""

    def put(module: str, name: str, function: Any) -> None:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            made = types.ModuleType(path)
            made.__spec__ = types.SimpleNamespace(name=path)  # type: ignore[assignment]
            made.__path__ = []
            monkeypatch.setitem(sys.modules, path, made)
        setattr(sys.modules[module], name, function)

    checks = (installed._first_right, installed._conv_is_right)
    for check in checks:
        check.cache_clear()
    yield put
    for check in checks:
        check.cache_clear()


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("module", "name", "make", "place"),
    [
        ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", scan_of_mamba_ssm, 0),
        ("fla.ops.simple_gla", "chunk_simple_gla", scan_of_fla, 1),
    ],
)
def test_an_installed_scan_is_used_where_its_numbers_are_right(
    module: str, name: str, make: Any, place: int, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(module, name, make(0.0))
    assert installed._first_trusted(CPU, torch.float32, 16, 8) == place
    operator = operators.build("mamba2", dim=16, d_state=8)
    x = torch.randn(2, 70, 16)
    right = operator(x)
    scan = installed.SCANS[place][2]
    called: list[int] = []
    monkeypatch.setattr(
        mamba2, "_installed_scan", lambda u, state: lambda *given: (called.append(1), scan(*given))[1]
    )
    torch.testing.assert_close(operator(x), right, rtol=1e-4, atol=1e-5)
    assert called


def test_an_installed_scan_that_is_off_or_fails_is_passed_over_with_a_warning(library: Any) -> None:
    library("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", lambda *given, **more: 1 / 0)
    library("fla.ops.simple_gla", "chunk_simple_gla", scan_of_fla(0.01))
    with pytest.warns(RuntimeWarning) as caught:
        assert installed._first_trusted(CPU, torch.float32, 16, 8) == -1
    texts = [str(one.message) for one in caught]
    assert len(texts) == 2
    assert "mamba-ssm's scan for mamba2 is not used here: it failed (ZeroDivisionError" in texts[0]
    assert "flash-linear-attention's scan for mamba2 is not used here: its output is off" in texts[1]


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_an_installed_filter_is_used_where_its_numbers_are_right(wrong: float, library: Any) -> None:
    def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        assert activation == "silu"
        filtered = causal_filter(x.transpose(1, 2), weight[:, None], bias + wrong)
        return F.silu(filtered).transpose(1, 2)

    library("causal_conv1d", "causal_conv1d_fn", causal_conv1d_fn)
    if wrong:
        with pytest.warns(RuntimeWarning, match="causal-conv1d is not used here: its output is off"):
            assert not installed._conv_trusted(CPU, torch.float32, 4)
        return
    assert installed._conv_trusted(CPU, torch.float32, 4)
    x = torch.randn(2, 9, 24)[..., :16]
    weight, bias = torch.randn(16, 1, 4), torch.randn(16)
    torch.testing.assert_close(
        installed._causal_conv1d(x, weight, bias), F.silu(causal_filter(x, weight, bias))
    )


def test_nothing_is_tried_on_a_cpu() -> None:
    x = torch.zeros(1, 300, 4, 16)
    assert installed.scan_for(x, 8) is None
    assert installed.filter_silu_for(x[:, :, 0], 4) is None
    assert not band.available(x.transpose(1, 2))


def test_a_self_check_sees_a_wrong_gradient_and_a_nan() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2.1 * gradient

    inputs = normals(CPU, torch.float32, (5,))
    assert agrees("it", lambda x: x * 2, lambda x: x + x, inputs)
    with pytest.warns(RuntimeWarning, match="it is not used here: its gradient 0 is off by 5"):
        assert not agrees("it", Wrong.apply, lambda x: 2 * x, inputs)
    with pytest.warns(RuntimeWarning, match="output is off by nan"):
        assert not agrees("it", lambda x: x * float("nan"), lambda x: 2 * x, inputs)
    with torch.inference_mode():
        assert agrees("it", lambda x: x * 2, lambda x: x + x, inputs)

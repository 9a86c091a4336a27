"""Draws are pure functions of (seed, purpose, index), uniform, normal and independent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grafting import draws

MANY = torch.arange(40_000)
PINNED_INTEGERS = [779, 845, 595]
PINNED_PERMUTATION = [1, 4, 3, 5, 2, 0, 7, 6]
PINNED_NORMALS = [0.335147, 3.0527751, 1.3740487, -0.2146467, 0.7404328, -1.3472357]


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest distance between the empirical and the given distribution function."""
    order = cdf[sample.argsort()].double()
    n = len(order)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps - order).abs().max().item(), (order - steps + 1 / n).abs().max().item())


def test_uniform_is_uniform() -> None:
    u = draws.uniform(0, "a", MANY).double()
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(u.mean().item() - 0.5) < 4 / math.sqrt(12 * len(u))
    assert kolmogorov_smirnov(u, u) < 1.95  # the 0.1 % level


def test_uniform_is_inside_of_the_open_interval_at_both_ends() -> None:
    ends = draws._unit(torch.tensor([0, -1, 1 << 31, (1 << 32) - 1]))
    assert ends.dtype == torch.float32
    assert (ends > 0).all()
    assert (ends < 1).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 10**12), st.integers(1, 300), st.integers(1, 2000))
def test_spread_integers_are_even_over_any_run_of_indices(
    seed: int, start: int, count: int, high: int
) -> None:
    """The discrepancy of the golden-ratio sequence grows with the logarithm of the run alone."""
    found = draws.spread_integers(seed, "t", torch.arange(start, start + count), high)
    assert found.min() >= 0
    assert found.max() < high
    below = torch.stack([(found < high * part // 10).sum() for part in range(1, 10)])
    wanted = torch.tensor([count * (high * part // 10) / high for part in range(1, 10)])
    assert (below - wanted).abs().max() <= 1 + math.log2(1 + count)


def test_spread_integers_differ_between_seeds() -> None:
    first, second = (draws.spread_integers(seed, "t", torch.arange(500), 1000) for seed in (0, 1))
    assert (first != second).double().mean() > 0.9


def test_normal_is_normal() -> None:
    z = draws.normal(1, "noise", MANY, (3,)).double()
    for moment, wanted, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        found = (z**moment).mean().item()
        assert abs(found - wanted) < 4.5 * math.sqrt(variance / z.numel()), moment
    flat = z.flatten()
    assert kolmogorov_smirnov(flat, 0.5 * (1 + torch.erf(flat / math.sqrt(2)))) < 1.95


def test_normals_of_one_sample_and_of_neighbours_do_not_correlate() -> None:
    z = draws.normal(3, "noise", torch.arange(2000), (16,)).double()
    within = torch.corrcoef(z.T) - torch.eye(16)
    assert within.abs().max() < 5 / math.sqrt(2000)
    lagged = (z[1:] * z[:-1]).mean(dim=1)
    assert abs(lagged.mean().item()) < 4.5 / math.sqrt(lagged.numel() * 16)


@pytest.mark.parametrize("other", [(1, "noise"), (0, "other"), (0, "noise/"), (2**31 - 1, "noise")])
def test_another_seed_or_purpose_is_another_stream(other: tuple[int, str]) -> None:
    a, b = draws.normal(0, "noise", MANY, (1,)), draws.normal(*other, MANY, (1,))
    assert abs((a * b).mean().item()) < 4.5 / math.sqrt(len(MANY))
    assert not torch.equal(a, b)


def test_integers_are_uniform_over_their_range() -> None:
    t = draws.integers(0, "t", MANY, 1000)
    assert (t.min().item(), t.max().item(), t.dtype) == (0, 999, torch.int64)
    counts = torch.bincount(t, minlength=1000).double()
    chi2 = ((counts - 40) ** 2 / 40).sum().item()
    assert abs(chi2 - 999) < 4.5 * math.sqrt(2 * 999)
    wide = draws.integers(0, "t", MANY, 2**31)
    assert wide.min() >= 0
    assert wide.max() < 2**31
    assert wide.max() > 0.999 * 2**31
    assert draws.integers(0, "t", MANY[:100], 1).max() == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), parts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
       first=st.integers(0, 2**40))  # fmt: skip
def test_draws_do_not_depend_on_how_a_batch_is_cut(seed: int, parts: list[int], first: int) -> None:
    index = torch.arange(first, first + sum(parts))
    for draw in (
        lambda i: draws.normal(seed, "n", i, (2, 3)),
        lambda i: draws.uniform(seed, "u", i),
        lambda i: draws.integers(seed, "t", i, 1000),
    ):
        assert torch.equal(torch.cat([draw(part) for part in index.split(parts)]), draw(index))
        assert torch.equal(draw(index.flip(0)).flip(0), draw(index))


def test_a_smaller_shape_is_not_a_reshaped_larger_one_but_values_stay() -> None:
    index = torch.arange(5)
    assert draws.normal(0, "n", index, (3, 5)).shape == (5, 3, 5)  # an odd count
    assert torch.equal(draws.uniform(0, "u", index, (4,))[:, :2], draws.uniform(0, "u", index, (2,)))


def test_draws_leave_torch_s_generator_alone() -> None:
    before = torch.get_rng_state()
    draws.normal(0, "n", MANY[:10], (2,))
    draws.permutation(0, "p", 0, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_values_are_pinned() -> None:
    """A change of these changes every run that anybody has: bump the formats if it must be."""
    index = torch.tensor([0, 1, 2**40])
    assert draws.integers(0, "distill/t", index, 1000).tolist() == PINNED_INTEGERS
    assert draws.permutation(0, "order", 3, 8).tolist() == PINNED_PERMUTATION
    found = draws.normal(7, "noise", index, (2,)).flatten().tolist()
    assert found == pytest.approx(PINNED_NORMALS, abs=1e-6)


def test_the_mixer_is_splitmix64() -> None:
    """The finaliser against arithmetic on Python's integers; the vector is the generator's published first output."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mix(golden) == 0xE220A8397B1DCDAF  # SplitMix64 of seed 0
    words = [golden * k % 2**64 for k in range(64)]
    signed = torch.tensor([w - 2**64 if w >= 2**63 else w for w in words])
    assert [w % 2**64 for w in draws._mix(signed).tolist()] == [mix(w) for w in words]


def test_permutations_are_permutations_new_in_every_epoch() -> None:
    orders = [draws.permutation(0, "order", epoch, 500) for epoch in range(4)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(500))
    for a in range(4):
        for b in range(a):
            assert (orders[a] == orders[b]).sum() < 12  # one is expected
    assert torch.equal(orders[1], draws.permutation(0, "order", 1, 500))
    firsts = np.array([draws.permutation(0, "order", epoch, 6)[0].item() for epoch in range(1200)])
    counts = np.bincount(firsts, minlength=6)
    assert ((counts - 200) ** 2 / 200).sum() < 25  # 5 degrees of freedom, level 1e-4


def test_torch_seed_is_one_that_torch_takes() -> None:
    seeds = {draws.torch_seed(seed, "init") for seed in range(50)}
    assert len(seeds) == 50
    for seed in seeds:
        torch.Generator().manual_seed(seed)

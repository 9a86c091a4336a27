"""`graft bench`: what it computes on both sides is the same, and its arithmetic is right; speed is not tested."""

from __future__ import annotations

import pytest
import torch

from grafting.benchmarks import run_benchmark
from grafting.benchmarks.timing import side_by_side, slope
from grafting.errors import GraftError


def test_slope_is_the_exponent_of_a_power_law() -> None:
    sizes = [1024, 2048, 4096, 8192]
    assert slope(sizes, [3e-6 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_sides_are_called_in_turns() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}  # type: ignore[misc]
    found = side_by_side(works, torch.device("cpu"), repeats=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert set(found) == {"a", "b"}
    assert all(side["min_s"] <= side["median_s"] <= side["max_s"] for side in found.values())


def test_both_forms_of_every_core_are_equal_and_the_flop_ceiling_is_the_cost_models() -> None:
    found = run_benchmark("operators", size="dit-fashion", repeats=1, growth=False)
    cores = {row["operator"]: row for row in found["rows"] if row["part"] == "core"}
    assert set(cores) == {"hyena_x", "swa", "mamba2"}
    assert all(row["max_difference"] < 1e-3 for row in cores.values())
    whole = {row["operator"]: row for row in found["rows"] if row["part"] == "whole"}
    assert whole["mha"]["ratio"] == 1
    n, d = 64, 128
    mha, hyena_x = 4 * n * n * d + 2 * n * n * 4 + 8 * n * d * d, 2 * n * d + 8 * n * d * d + 24 * n * d
    assert whole["hyena_x"]["flop_ceiling"] == pytest.approx(mha / hyena_x)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("walk", {}, "unknown benchmark 'walk'"),
        ("operators", {"size": "XXL"}, "unknown size 'XXL'"),
        ("operators", {"dtype": "int4"}, "unknown dtype"),
        ("stage1", {"size": "XL/2-256"}, "takes no 'size'"),
    ],
)
def test_what_a_benchmark_does_not_know_is_refused(what: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(GraftError, match=message):
        run_benchmark(what, **options)

"""`graft bench`: what it computes on both sides is the same, and its arithmetic is right; speed is not tested."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import prediction, tiny_dit

from grafting import GraftPlan, Replace, graft
from grafting.benchmarks import everything, run_benchmark, stage1, stage1_memory, stage2, timing
from grafting.benchmarks.published import PublishedAttention, PublishedHyenaX, published_form
from grafting.benchmarks.timing import kept_memory, side_by_side, slope
from grafting.errors import GraftError


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """They collect garbage between any two rows: not among all that tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


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
    peak = found["ceilings"]["copy_bytes_per_s"]
    u, y = 3 * 64 * 128 * 4, 64 * 128 * 4  # of hyena_x; its filters have 5 values a channel
    row = cores["hyena_x"]
    assert row["bytes"] == 3 * (u + 3 * 128 * 5 * 4) + 2 * y
    assert row["share_of_copy"] == pytest.approx(row["bytes"] / row["seconds"] / peak)
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
        ("depth", {"updates": 3}, "takes no 'updates'"),
        ("stage2", {"dtype": "float16"}, "unknown dtype 'float16'"),
        ("stage2", {"mode": "fast"}, "unknown mode 'fast'"),
        ("sample", {"mode": "fast"}, "unknown mode 'fast'"),
        ("stage1", {"dtype": "int4"}, "unknown dtype 'int4'"),
        ("all", {"size": "XL/2"}, "unknown size 'XL/2'"),
    ],
)
def test_what_a_benchmark_does_not_know_is_refused(what: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(GraftError, match=message):
        run_benchmark(what, **options)


def test_the_published_form_of_a_model_computes_the_same() -> None:
    student = graft(tiny_dit(), GraftPlan([Replace("mha", [1, 3], "hyena_x", init="random")]))
    plain = published_form(student)
    kinds = [type(block.attn) for block in plain.blocks]  # type: ignore[union-attr]
    assert kinds == [PublishedAttention, PublishedHyenaX] * 2
    torch.testing.assert_close(prediction(plain), prediction(student), rtol=1e-4, atol=1e-5)
    assert not {id(p) for p in plain.parameters()} & {id(p) for p in student.parameters()}


def test_both_loops_of_stage_2_train_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    original = stage2._Published._step

    def step(self: Any, *given: Any) -> float:
        steps.append("published")
        return original(self, *given)

    monkeypatch.setattr(stage2._Published, "_step", step)
    found = run_benchmark(
        "stage2", size="S/8-D2", batch_size=4, micro_batch=2, updates=2, repeats=1, dtype="float32"
    )
    assert len(steps) == 2 * (1 + 2)  # a warm-up turn and a timed one, each with a step ahead
    rows = {row["loop"]: row for row in found["rows"]}
    assert set(rows) == {"published", "eager"}
    assert rows["published"]["ratio"] == 1
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(8 / row["seconds"])
        peak = found["ceilings"]["fp32"]["matmul_flops_per_s"]
        assert row["share_of_matmul"] == pytest.approx(found["flops_per_image"] * row["images_per_s"] / peak)
    assert found["host_syncs_per_step"] is None


def test_all_benchmarks_at_tiny_sizes_and_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1, "_in_process", lambda work, *given: stage1._measured(work, given))
    monkeypatch.setattr(stage1, "_one_job", lambda *given: 1 / 0)
    monkeypatch.setattr(timing, "PROBE_ELSEWHERE", (64, 1 << 16))  # those of the device take a second each
    counted = {"one operator per job": (3, False), "one pass, one graph at a time": ("2-3", False),
               "one pass, all graphs at once": ("2-3", True)}  # fmt: skip
    assert list(counted) == list(stage1_memory.WAYS)
    (whole,) = GraftPlan([Replace("mha", stage1_memory.LAYERS, "hyena_x")]).resolve(28)
    assert len(whole.layers) == 14  # type: ignore[union-attr]
    monkeypatch.setattr(stage1_memory, "WAYS", counted)
    monkeypatch.setitem(everything._TINY, "stage1-memory", {"size": "DiT-S/8-D4"})
    found = run_benchmark("all", size="tiny", device="cpu")
    assert [one["benchmark"] for one in found["results"]] == [what for what, _ in everything.JOBS["cuda"]]
    for one in found["results"]:
        assert one["benchmark"] == "stage1" or "error" not in one, one
        assert one["benchmark"] != "stage1" or one["error"] == "ZeroDivisionError: division by zero"
    models = {row["model"]: row for one in found["results"] for row in one.get("rows", []) if "model" in row}
    assert set(models) == {"published", "teacher", "student"}


def test_stage_1_of_several_jobs_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1, "_in_process", lambda work, *given: stage1._measured(work, given))
    found = run_benchmark(
        "stage1", size="S/8-D2", updates=2, batch_size=4, layers="all", jobs=1, dtype="float32"
    )
    one = found["one_pass"]
    assert found["operators"] == 2
    assert found["one_job_per_operator"]["jobs_run"] == 1
    assert one["projected_minutes_of_8k_x_200_visits"] == pytest.approx(1.6e6 / one["images_per_s"] / 60)


def test_memory_of_large_tensors_is_kept_and_given_back() -> None:
    with kept_memory(torch.device("cpu")):
        assert torch.ones(20_000_000).sum() == 20_000_000
    with kept_memory(torch.device("meta")):
        pass

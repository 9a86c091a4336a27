"""Costs: the paper's cost columns through the command line, per-layer sums, traced operators, and measurements."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from torch import Tensor, nn

from grafting import GraftPlan, Replace, cli, graft, load_model, operators, save_graft
from grafting.analysis import latency
from grafting.analysis.costs import base_of, plan_cost
from grafting.analysis.latency import amdahl, measure_plan, time_in_turns
from grafting.analysis.memory import LiveBytes, peak_bytes, weight_bytes
from grafting.errors import GraftError
from grafting.operators import registry
from grafting.training import acceleration

Graft = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Graft:
    """Call `graft` in this process: (exit status, stdout, stderr)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return call


def plan_file(folder: Path, target: str, layers: str, operator: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(f"- replace: {{target: {target}, layers: {layers}, with: {operator}}}\n")
    return path


# ---- Table 4 of arXiv 2506.05340


SHARES = {"50": "interleaved-50", "75": "interleaved-75", "100": "all"}
# target, operator, then (op, ft, params) at 50, 75, 100 %. None: the table has no figure, or (mamba2's ft) a figure
# that its own layers contradict; there we hold our own count, which follows the parameters.
TABLE_4: list[tuple[str, str, Any, Any, Any]] = [
    ("mha", "hyena_se", (-49.52, 0.13, 0.22), (-74.27, 0.20, 0.33), (-99.03, 0.26, 0.43)),
    ("mha", "hyena_x", (-49.90, 0.13, 0.16), (-74.85, 0.20, 0.24), (-99.81, 0.26, 0.33)),
    ("mha", "hyena_y", (-49.52, 0, 0.05), (-74.27, 0, 0.08), (-99.03, 0, 0.11)),
    ("mha", "{swa: {window: 4}}", (-48.24, 0, 0), (-72.36, 0, 0), (-96.48, 0, 0)),
    ("mha", "mamba2", (-37.59, 28.05, 28.02), (-56.38, 42.07, 42.04), (-75.17, 56.09, 56.05)),
    ("mlp", "{mlp: {ratio: 3}}", (-12.5, None, -12.5), (-18.75, None, -18.75), (-25, None, -25)),
    ("mlp", "{mlp: {ratio: 6}}", (25, None, 25), (37.5, None, 37.5), (50, None, 50)),
    ("mlp", "{mlp_hyena_x: {ratio: 2}}", (0.01, None, 0.02), (0.02, None, 0.03), (0.02, None, 0.03)),
]  # fmt: skip
PLANS = [(row, column) for row in range(len(TABLE_4)) for column in range(3)]


@pytest.mark.parametrize(
    ("row", "column"), PLANS, ids=[f"{TABLE_4[r][1].strip('{}')}-{[*SHARES][c]}" for r, c in PLANS]
)
def test_cost_is_table_4(run: Graft, tmp_path: Path, row: int, column: int) -> None:
    target, operator, *figures = TABLE_4[row]
    share = list(SHARES)[column]
    code, text, stderr = run(
        "cost", "arch:DiT-XL/2", "--plan", plan_file(tmp_path, target, SHARES[share], operator), "--json"
    )
    assert (code, stderr) == (0, "")
    found = json.loads(text)
    (found_row,) = found["rows"]
    assert (found_row["target"], found_row["operator"]) == (target, operator.strip("{}").split(":")[0])
    assert len(found_row["layers"]) == 28 * int(share) // 100
    assert found["model"]["params"][0] == 675_129_632
    for name, wanted in zip(("flops_op_pct", "flops_ft_pct", "params_pct"), figures[column], strict=True):
        if wanted is None:
            assert found_row[name] is None
        else:
            assert found_row[name] == pytest.approx(wanted, abs=0.0125), name
    # the layers and the model add up to the row
    layers = [layer for layer in found["layers"] if layer["target"] == target]
    assert len(layers) == 28
    assert [n["layer"] for n in layers if n["operator"][1] != target or n["params"][0] != n["params"][1]] == (
        found_row["layers"]
    )
    for key, name in (("flops_op", "flops_op_pct"), ("params", "params_pct")):
        before, after = (sum(layer[key][side] for layer in layers) for side in (0, 1))
        assert found_row[name] == pytest.approx(100 * (after - before) / before, abs=1e-4)
    for side in (0, 1):
        model = found["model"]
        assert model["flops_op"][side] == sum(layer["flops_op"][side] for layer in found["layers"])
        assert model["flops_ft"][side] == sum(layer["flops_ft"][side] for layer in found["layers"])
    before, after = found["model"]["flops_per_image"]
    split = [found["model"]["flops_op"][side] + found["model"]["flops_ft"][side] for side in (0, 1)]
    assert after - before == pytest.approx(split[1] - split[0])


def test_an_edited_model_costs_what_its_own_plan_costs(tmp_path: Path, run: Graft, model: nn.Module) -> None:
    plan = GraftPlan([Replace("mha", [1, 3], "hyena_x"), Replace("mlp", [0], "mlp", {"ratio": 3})])
    student = graft(model, plan)
    assert plan_cost(student) == plan_cost(model, plan)
    save_graft(student, tmp_path / "graft")
    torch.save(model.state_dict(), tmp_path / "base.pt")
    found = plan_cost(model)
    assert found["rows"] == []
    assert found["model"]["params"][0] == found["model"]["params"][1]
    code, text, _ = run("cost", "arch:DiT-S/8-D2", "--layers")
    assert code == 0
    assert text.count("mlp -> mlp") == 2
    assert next(base_of(student).parameters()).is_meta
    assert base_of(model) is model


# ---- an operator that states no cost


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @operators.register("low_rank_mixer", targets=("mha",), package="elsewhere")
    class LowRankMixer(nn.Module):
        """x W1 W2, then a convolution over the tokens; no `cost`."""

        def __init__(self, *, dim: int, rank: int = 8) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim)
            self.mix = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.up(self.down(x)).transpose(1, 2)).transpose(1, 2)


@pytest.mark.usefixtures("third_party")
def test_an_operator_that_states_no_cost_is_traced(run: Graft, tmp_path: Path) -> None:
    plan = plan_file(tmp_path, "mha", "[0, 3]", "{low_rank_mixer: {rank: 6}}")
    code, text, stderr = run("cost", "arch:DiT-S/4", "--plan", plan, "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(text)
    n, d, heads, rank = 64, 384, 6, 6
    traced = 2 * n * d * rank + 2 * n * rank * d + 2 * 3 * n * d  # down, up, depthwise convolution
    params = d * rank + rank * d + d + 3 * d + d
    layers = {layer["layer"]: layer for layer in found["layers"] if layer["target"] == "mha"}
    assert layers[0]["flops_op"] == [4 * n * n * d + 2 * n * n * heads, traced]
    assert layers[0]["flops_ft"] == [8 * n * d * d, 0]
    assert layers[0]["params"] == [4 * d * d + 4 * d, params]
    assert layers[1]["operator"] == ["mha", "mha"]
    (row,) = found["rows"]
    op, ft, own = 4 * n * n * d + 2 * n * n * heads, 8 * n * d * d, 4 * d * d + 4 * d
    assert row["flops_op_pct"] == pytest.approx(100 * 2 * (traced - op) / (12 * op), abs=1e-3)
    assert row["flops_ft_pct"] == pytest.approx(-100 * 2 * ft / (12 * ft), abs=1e-3)
    assert row["params_pct"] == pytest.approx(100 * 2 * (params - own) / (12 * own), abs=1e-3)
    before, after = found["model"]["flops_per_image"]
    assert after - before == pytest.approx(2 * (traced - op - ft))


# ---- memory


def test_live_bytes_are_those_of_storages_that_are_alive() -> None:
    x = torch.zeros(1000)  # was there before: not counted
    with LiveBytes() as tracked:
        a = x + 1  # 4000 bytes
        b = a.view(10, 100)[3:].t()  # the same storage
        c = a.double()  # 8000 more
        assert tracked.live == 12000
        del a
        assert tracked.live == 12000  # b holds it
        del b
        assert tracked.live == 8000
        c.mul_(2)
        y = x.view(10, 100).sum(0)  # 400
        del c, y
    assert tracked.live == 0
    assert tracked.peak == 12000
    assert LiveBytes().peak == 0


def test_peak_memory_of_a_backward_pass_is_its_saved_tensors_and_gradients() -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(256, 64)

    def work() -> None:
        layer(x).square().sum().backward()

    token, weight = 256 * 64 * 4, 64 * 64 * 4
    peak = peak_bytes(work, CPU)
    # the output and its square, then the factors of its gradient, and the weight's
    assert 2 * token <= peak <= 4 * token + 2 * weight
    layer.weight.grad = None
    with torch.no_grad():
        assert peak_bytes(lambda: layer(x), CPU) == token
    assert weight_bytes(layer) == weight
    tied = nn.Sequential(layer, layer)
    assert weight_bytes(tied) == weight


def test_the_meta_device_counts_what_the_cpu_does() -> None:
    def block(device: str) -> int:
        layer = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)).to(device)
        x = torch.zeros(7, 32, device=device)
        return peak_bytes(lambda: layer(x).square().mean().backward(), torch.device(device))

    assert block("meta") == block("cpu")


# ---- measurements


def test_a_plan_is_measured(model: nn.Module) -> None:
    plan = GraftPlan([Replace("mha", [0, 2], "hyena_x"), Replace("mlp", "all", "mlp", {"ratio": 6})])
    found = measure_plan(model, plan, batch_size=3, repeat=4)
    assert found["speedup"] == found["latency_ms"][0] / found["latency_ms"][1]
    for (low, high), median in zip(found["quartiles_ms"], found["latency_ms"], strict=True):
        assert 0 < low <= median <= high
    counted = plan_cost(model, plan)
    before, after = counted["model"]["flops_per_image"]
    assert found["flops_speedup"] == pytest.approx(before / after)
    mha = [layer for layer in counted["layers"] if layer["target"] == "mha" and layer["layer"] in (0, 2)]
    mlp = [layer for layer in counted["layers"] if layer["target"] == "mlp"]
    share = sum(layer["flops_op"][0] + layer["flops_ft"][0] for layer in (*mha, *mlp)) / before
    assert found["ceiling"]["flops_share"] == pytest.approx(share)
    assert found["ceiling"]["from_flops"] == pytest.approx(1 / (1 - share))
    assert {row["operator"]: row["layers"] for row in found["operators"]} == {
        "hyena_x": [0, 2], "mlp": [0, 1, 2, 3]
    }  # fmt: skip
    # 6 instead of 4 hidden values a channel: weights grow by what the plan says, activations of the pass too
    grown = [weight_bytes(m) for m in (model, graft(model, plan))]
    assert grown[1] - grown[0] == 4 * (counted["model"]["params"][1] - counted["model"]["params"][0])
    more = found["peak_memory_bytes"][1] - found["peak_memory_bytes"][0]
    assert more > grown[1] - grown[0]
    assert found["memory"].startswith("live bytes")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_plan_is_measured_compiled(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[nn.Module, ...]] = []

    def spy(modules: Sequence[nn.Module], setting: Any, device: torch.device) -> Any:
        seen.append(tuple(modules))
        return acceleration.compiled(modules, setting, device)

    monkeypatch.setattr(latency, "compiled", spy)
    found = measure_plan(
        model, GraftPlan([Replace("mha", [0], "hyena_x")]), repeat=1, warm_up=1, compile=True
    )
    assert found["compiled"]
    blocks, operators = seen
    assert len(blocks) == 2 * len(model.blocks)  # of both models
    assert operators[0] is model.blocks[0].attn
    assert all(
        module._compiled_call_impl is None for module in (*blocks, *operators)
    )  # and left as they were


def test_a_plan_of_the_depth_alone_has_no_ceiling(model: nn.Module) -> None:
    plan = GraftPlan.from_dict([{"parallelize": {"groups": [[0, 1]]}}])
    found = measure_plan(model, plan, repeat=1, warm_up=1)
    assert "ceiling" not in found
    assert found["operators"] == []


@pytest.mark.parametrize("depth", [{"parallelize": {"groups": [[0, 1]]}}, {"prune": {"layers": [0]}}])
def test_a_plan_that_edits_operators_and_the_depth_has_no_ceiling(
    model: nn.Module, depth: dict[str, Any]
) -> None:
    """Dropped blocks gain more than free operators would: a ceiling of the operators alone would be below that."""
    plan = GraftPlan.from_dict([{"replace": {"target": "mha", "layers": [2], "with": "hyena_x"}}, depth])
    found = measure_plan(model, plan, repeat=1, warm_up=1)
    assert [row["operator"] for row in found["operators"]] == ["hyena_x"]
    assert "ceiling" not in found


def test_ceilings() -> None:
    assert amdahl(0.31) == pytest.approx(1.45, abs=0.005)  # half of the layers at a share of 62 %
    assert amdahl(0.0) == 1
    assert amdahl(1.0) is None


def test_works_are_timed_in_turns() -> None:
    calls: list[str] = []
    times = time_in_turns([lambda: calls.append("a"), lambda: calls.append("b")], 3, CPU)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3
    assert [len(t) for t in times] == [3, 3]


def test_what_can_not_be_measured_is_refused(model: nn.Module) -> None:
    plan = GraftPlan([Replace("mha", [0], "swa")])
    with pytest.raises(GraftError, match="meta device"):
        measure_plan(load_model("arch:DiT-S/8", device="meta"), plan)
    with pytest.raises(GraftError, match="give a plan"):
        measure_plan(model)
    with pytest.raises(GraftError, match="repeat=0"):
        measure_plan(model, plan, repeat=0)


def test_measure_from_the_command_line(run: Graft, tmp_path: Path) -> None:
    plan = plan_file(tmp_path, "mha", "interleaved-50", "hyena_y")
    options = ("--measure", "--repeat", 2, "--batch-size", 2)
    code, text, stderr = run(
        "cost", "arch:DiT-S/8-D2", "--plan", plan, "--dtype", "bfloat16", *options, "--json"
    )
    assert code == 0
    assert "random weights" in stderr
    found = json.loads(text)["measured"]
    assert (found["dtype"], found["batch_size"], found["repeat"]) == ("bfloat16", 2, 2)
    # an imported or saved graft is compared with its base, without a plan given
    save_graft(graft(tiny_dit(), GraftPlan([Replace("mha", [1], "swa")])), tmp_path / "graft")
    manifest = json.loads((tmp_path / "graft" / "graft.json").read_text())
    assert manifest["base"] is not None
    student = graft(tiny_dit(), GraftPlan([Replace("mha", [1], "swa")]))
    found = measure_plan(student, repeat=1)
    assert found["operators"][0]["operator"] == "swa"
    code, text, stderr = run("cost", "arch:DiT-S/8-D2", "--measure", "--json")
    assert code == 2
    assert "give a plan" in stderr

"""Operators of others: what they may be, what is said of them, and what is said where they are wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from stage_tools import STAGE_1
from tiny_runs import tiny_recipe
from torch import Tensor, nn

from grafting import GraftPlan, Replace, distill, explain, finetune, graft
from grafting.data import ImageLabelDataset
from grafting.errors import DivergedError, PlanError
from grafting.operators import AttentionDonor, Operator, build, cost_of, linear, register, registry
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe
from grafting.rehearsal import rehearse
from grafting.runs import RunFolder
from grafting.training.loop import Quiet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_dit()


def own(name: str, forward: Any, *, lazy: bool = False) -> None:
    """Register a linear layer of others whose output goes through `forward`."""

    class Own(nn.Module):
        def __init__(self, *, dim: int) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(dim) if lazy else nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = forward(self.layer(x))
            return y

    Own.__module__ = "elsewhere"
    register(name, targets=("mha",))(Own)


def identity() -> None:
    class NoAttention(nn.Module):
        def __init__(self, *, dim: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x

    NoAttention.__module__ = "elsewhere"
    register("nothing", targets=("mha",))(NoAttention)


@pytest.mark.parametrize("mode", ["one-pass", "cached"])
def test_an_operator_without_parameters_has_nothing_to_learn(
    teacher: nn.Module, data: ImageLabelDataset, mode: str
) -> None:
    identity()
    alone = graft(teacher, [Replace("mha", [1], "nothing")])
    result = distill(alone, teacher, data, {**STAGE_1, "mode": mode})
    assert (result.steps, result.image_visits, result.flops) == (0, 0, 0)
    assert result.final_error == result.start_error["random"]
    assert set(result.start_error) == {"random"}
    both = graft(teacher, [Replace("mha", [1], "nothing"), Replace("mha", [2], "hyena_x")])
    result = distill(both, teacher, data, {**STAGE_1, "mode": mode})
    assert result.steps == STAGE_1["steps"]
    assert set(result.final_error) == {"blocks.1.attn", "blocks.2.attn"}
    assert result.rested == {}
    assert result.final_error["blocks.2.attn"] < result.start_error["random"]["blocks.2.attn"]
    finetune(both, data, {**STAGE_1, "steps": 2})


@pytest.mark.parametrize("name", ["hyena_x", "mha"])
def test_a_plan_of_which_nothing_is_trained(teacher: nn.Module, data: ImageLabelDataset, name: str) -> None:
    student = graft(teacher, [Replace("mha", [1], name, train=False)])
    before = {key: value.clone() for key, value in student.state_dict().items()}
    result = distill(student, teacher, data, STAGE_1)
    assert (result.steps, result.final_error) == (0, {})
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_what_has_nothing_to_learn_is_estimated(tmp_path: Path) -> None:
    identity()
    for others in ([], [{"replace": {"target": "mha", "layers": [2], "with": "hyena_x"}}]):
        plan = [{"replace": {"target": "mha", "layers": [1], "with": "nothing"}}, *others]
        recipe = load_recipe(tiny_recipe(tmp_path, plan=plan))
        found = rehearse(Pipeline(recipe, RunFolder(tmp_path / "run")))
        assert found["notes"] == []
        assert (found["stages"]["distill"]["seconds"] > 0) is bool(others)
        assert found["stages"]["distill"]["memory"]["total"] > 0


def test_outputs_that_are_not_finite_are_the_operator_s(teacher: nn.Module, data: ImageLabelDataset) -> None:
    own("nan", lambda y: y * float("nan"))
    student = graft(teacher, [Replace("mha", [2], "nan"), Replace("mha", [1], "hyena_x")])
    journal = Quiet()
    with pytest.raises(
        DivergedError, match=r"at blocks\.2\.attn 'nan' gives outputs that are not finite"
    ) as caught:
        distill(student, teacher, data, STAGE_1, journal=journal)
    assert "checkpoint" not in str(caught.value)  # there is none
    assert "precision" not in str(caught.value)  # it is fp32
    assert not any(record.get("step") for record in journal.records)


def test_an_error_promises_no_checkpoint_that_is_not_there(
    teacher: nn.Module, data: ImageLabelDataset
) -> None:
    own("grows", torch.exp)
    student = graft(teacher, [Replace("mha", [2], "grows")])
    with pytest.raises(DivergedError, match=r"not finite at step \d+; lower lr \(now 100\)$"):
        distill(student, teacher, data, {**STAGE_1, "lr": 100.0, "warmup": 0, "steps": 60, "clip": 1e9})


def test_tokens_keep_their_type(teacher: nn.Module) -> None:
    own("double", lambda y: y.double())
    with pytest.raises(PlanError, match=r"layer 1.*'double' gives torch.float64 for tokens of torch.float32"):
        graft(teacher, [Replace("mha", [1], "double")])


def test_lazy_layers_are_refused(teacher: nn.Module) -> None:
    own("lazy", lambda y: y, lazy=True)
    with pytest.raises(PlanError, match=r"'lazy' has lazy layers.*build them from `dim`"):
        graft(teacher, [Replace("mha", [1], "lazy")])


def test_what_takes_nothing_of_a_donor_starts_at_random(teacher: nn.Module, data: ImageLabelDataset) -> None:
    """It said "donor", and gave the random start's error a second and a third time as copied and fitted."""
    own("plain", lambda y: y)

    @register("starts", targets=("mha",))
    class Starts(Operator):
        def __init__(self, *, dim: int) -> None:
            super().__init__()
            self.out_proj = linear(dim, dim)

        def mix(self, x: Tensor) -> Tensor:
            return x

        def copy_donor(self, donor: AttentionDonor) -> list[str]:  # type: ignore[override]
            self.out_proj.weight.copy_(donor.out_weight)
            return ["out_proj.weight"]

    plan = GraftPlan(
        [Replace("mha", [0], "plain"), Replace("mha", [1], "starts"), Replace("mha", [2], "hyena_x")]
    )
    said = {edit["to"]: edit["init"] for edit in explain(teacher, plan).to_dict()["edits"]}
    assert said == {"plain": "random", "starts": "donor", "hyena_x": "donor"}
    result = distill(graft(teacher, plan), teacher, data, STAGE_1)
    assert set(result.start_error["random"]) == {f"blocks.{n}.attn" for n in range(3)}
    for start in ("copied", "fitted"):
        assert set(result.start_error[start]) == {"blocks.1.attn", "blocks.2.attn"}


def test_the_example_of_contributing_runs(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?MixNeighbours.*?)```", text, flags=re.S)
    (tmp_path / "neighbours.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    import neighbours  # type: ignore[import-not-found]  # noqa: F401

    module = build("mix_neighbours", dim=32)
    cost = cost_of(module, num_tokens=16, dim=32)
    assert cost.total >= 2 * 16 * 32 * 32  # its readout at least
    assert cost.params == sum(p.numel() for p in module.parameters())
    assert module.cost(16) == cost  # type: ignore[operator]
    student = graft(teacher, [Replace("mha", [1], "mix_neighbours")])
    result = distill(student, teacher, data, STAGE_1)
    assert result.start_error["fitted"]["blocks.1.attn"] < result.start_error["random"]["blocks.1.attn"]

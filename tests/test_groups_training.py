"""Groups of blocks in both stages: taps, the least-squares merge, who owns a weight, resume, features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prediction
from torch import Tensor, nn

from grafting import GraftPlan, Parallelize, Replace, distill, explain, finetune, graft, load_model
from grafting.benchmarks import run_benchmark
from grafting.console import Console
from grafting.data import ImageLabelDataset
from grafting.entries import Prune
from grafting.errors import GraftError, Interrupted, PlanError
from grafting.families import Tap, family_of
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe, recipe_mapping
from grafting.recipes.depth import DEPTH_TO_WIDTH, summarize
from grafting.recipes.rows import row_recipe
from grafting.report import write_report
from grafting.report.reading import read_run
from grafting.report.words import sentence
from grafting.runs import RunFolder
from grafting.studies.shelf import Shelf
from grafting.studies.stage_1 import shared_stage_1
from grafting.training.config import FinetuneConfig
from grafting.training.initialization import ReadoutFit
from grafting.training.loop import Batches, Quiet, family_and_model, learning_rate, step_index
from grafting.training.objectives import mixed_loss
from grafting.training.trained import trained_parameters

STAGE_1 = {
    "steps": 3,
    "batch_size": 8,
    "num_validation": 8,
    "fit_samples": 32,
    "validate_every": 3,
    "warmup": 1,
    "precision": "fp32",
}
PAIRS = GraftPlan([Parallelize("pairs")])


def taps_of(model: nn.Module, paths: list[str]) -> dict[str, Tap]:
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    t, y = torch.arange(6) * 150, torch.arange(6) % 4
    return family_of(model).taps(model, x, t, y, paths)


def test_taps_of_spans_and_of_operators_in_groups(model: nn.Module) -> None:
    found = taps_of(model, ["blocks.1-2", "blocks.1-3", "blocks.2.attn"])
    span, longer = found["blocks.1-2"], found["blocks.1-3"]
    assert torch.equal(span.input, longer.input)
    wanted = model.blocks[2](model.blocks[1](span.input, span.cond), span.cond)
    torch.testing.assert_close(span.output, wanted)
    torch.testing.assert_close(longer.output, model.blocks[3](wanted, span.cond))
    student = graft(model, GraftPlan([Parallelize([[1, 2]])]))
    inside = taps_of(student, ["blocks.1.branches.1.attn", "blocks.1-2", "blocks.3-3", "blocks.2.mlp"])
    tap, branch = inside["blocks.1.branches.1.attn"], student.blocks[1].branch(1)
    torch.testing.assert_close(branch.attn(tap.input), tap.output)
    torch.testing.assert_close(inside["blocks.1-2"].output, inside["blocks.3-3"].input)
    torch.testing.assert_close(
        student.blocks[2].mlp(inside["blocks.2.mlp"].input), inside["blocks.2.mlp"].output
    )


@pytest.mark.parametrize("merge", ["concat", "residual"])
def test_the_fit_is_the_ridge_solution(model: nn.Module, merge: str) -> None:
    group = graft(model, GraftPlan([Parallelize([[0, 1]], merge)])).blocks[0]
    (tap,) = taps_of(model, ["blocks.0-1"]).values()
    outputs = [model.blocks[layer](tap.input, tap.cond) for layer in (0, 1)]
    if merge == "residual":
        z, y = torch.cat([o - tap.input for o in outputs], dim=2), tap.output - tap.input
    else:
        z, y = torch.cat(outputs, dim=2), tap.output
    z, y = z.detach().flatten(0, 1).double(), y.flatten(0, 1).double()
    start = group.merge.weight.detach().double().clone()
    ridge, ones = 1e-2, torch.ones(len(z), 1, dtype=torch.float64)
    damping = ridge * z.square().sum(0).mean() * torch.eye(z.shape[1], dtype=torch.float64)
    damping = torch.block_diag(damping, torch.zeros(1, 1, dtype=torch.float64))
    wide = torch.cat([z, ones], dim=1)
    update = torch.linalg.solve(wide.T @ wide + damping, wide.T @ (y - z @ start.T))
    fit = ReadoutFit(group, torch.device("cpu"))
    for part in range(0, 6, 2):
        fit.add(Tap(*(None if v is None else v[part : part + 2] for v in tap)))
    assert fit.solve(ridge)
    torch.testing.assert_close(group.merge.weight, (start + update[:-1].T).float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(group.merge.bias, update[-1].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["one-pass", "cached"])
def test_stage_1_teaches_a_group_its_blocks_in_sequence(
    model: nn.Module, data: ImageLabelDataset, mode: str
) -> None:
    student = graft(model, GraftPlan([Parallelize([[0, 1]]), Parallelize([[2, 3]], "residual")]))
    journal = Quiet()
    config = {**STAGE_1, "steps": 30, "batch_size": 16, "mode": mode, "lr": 2e-3}
    result = distill(student, model, data, config, journal=journal)
    paths = ["blocks.0-1", "blocks.2-3"]
    assert set(result.start_error) == {"random", "copied", "fitted"}
    for path in paths:
        start = {kind: errors[path] for kind, errors in result.start_error.items()}
        assert result.final_error[path] < start["fitted"] < start["copied"] < start["random"]
    assert journal.records[0]["error"] == result.start_error
    assert [group.is_stacked for group in student.blocks] == [True, True]
    (tap,) = taps_of(model, paths[:1]).values()
    error = (student.blocks[0](tap.input, tap.cond) - tap.output).abs().mean() / tap.output.abs().mean()
    assert error < 1.3 * result.final_error[paths[0]]


def test_the_first_loss_is_l1_on_the_output_of_the_group(model: nn.Module, data: ImageLabelDataset) -> None:
    student, journal = graft(model, PAIRS), Quiet()
    group = graft(model, PAIRS).blocks[1]
    config = {**STAGE_1, "steps": 1, "num_validation": 0, "fit_readout": False, "log_every": 1}
    distill(student, model, data, config, journal=journal)
    batches = Batches(
        data,
        family_of(model),
        model,
        seed=0,
        purpose="distill",
        label_dropout=0.1,
        device=torch.device("cpu"),
    )
    batch = batches.at(step_index(0, 8))
    (tap,) = family_of(model).taps(model, batch.x_t, batch.t, batch.cond, ["blocks.2-3"]).values()
    wanted = (group(tap.input, tap.cond) - tap.output).abs().mean().item()
    (record,) = [r for r in journal.records if "loss" in r]
    assert record["loss"]["blocks.2-3"] == pytest.approx(wanted, rel=1e-5)


def test_an_operator_in_a_branch_learns_from_its_own_lesson_alone(
    model: nn.Module, data: ImageLabelDataset
) -> None:
    swap = Replace("mha", [0, 1], "hyena_x")
    config = {**STAGE_1, "fit_readout": False, "early_stop": 0, "keep_best": False}
    alone, both = graft(model, GraftPlan([swap])), graft(model, GraftPlan([swap, Parallelize([[0, 1]])]))
    assert both.blocks[0].is_stacked
    results = [distill(student, model, data, config) for student in (alone, both)]
    assert both.blocks[0].is_stacked  # open only while it learned
    for j in (0, 1):
        for name, value in alone.blocks[j].attn.state_dict().items():
            torch.testing.assert_close(both.blocks[0].branch(j).attn.state_dict()[name], value)
    assert list(results[1].final_error) == ["blocks.0.attn", "blocks.1.attn", "blocks.0-1"]
    other = both.blocks[0].branch(0).mlp.fc1.weight
    assert not torch.equal(other, model.blocks[0].mlp.fc1.weight)  # the rest of the group learned


def test_kept_weights_stay(model: nn.Module, data: ImageLabelDataset) -> None:
    plan = [
        Replace("mha", [0], "swa", train=False),
        Parallelize([[0, 1]]),
        Parallelize([[2, 3]], train=False),
    ]
    student = graft(model, GraftPlan(plan))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    result = distill(student, model, data, {**STAGE_1, "keep_best": False})
    finetune(student, data, {"steps": 2, "batch_size": 8, "num_validation": 0, "lr": 1e-2})
    assert list(result.final_error) == ["blocks.0-1"]
    after = student.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    fixed = {
        n for n in before if n.startswith(("blocks.0.branches.0.attn.", "blocks.1.")) or n == "pos_embed"
    }
    assert same == fixed


def test_nothing_to_distill_says_what_to_do(model: nn.Module, data: ImageLabelDataset) -> None:
    with pytest.raises(PlanError, match=r"distill: null"):
        distill(graft(model, GraftPlan([Prune([1])])), model, data, STAGE_1)


class _Memory(Quiet):
    """Keeps the last checkpoint, and asks to stop once."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.state: dict[str, Any] | None = None
        self.asked, self.stop_at = 0, stop_at

    def save_checkpoint(self, stage: str, step: int, state: Any, keep: int) -> None:
        import copy

        self.state = copy.deepcopy(state)

    def load_checkpoint(self, stage: str) -> dict[str, Any] | None:
        return self.state

    def stop_requested(self) -> int | None:
        self.asked += 1
        return 130 if self.asked == self.stop_at else None


@pytest.mark.parametrize("inside", [True, False])
def test_stage_1_resumes_to_the_same_weights(model: nn.Module, data: ImageLabelDataset, inside: bool) -> None:
    swaps = [Replace("mha", [0, 1], "hyena_x")] if inside else []
    plan, config = GraftPlan([*swaps, Parallelize("pairs")]), {**STAGE_1, "steps": 4, "optimizer": "muon"}
    whole = graft(model, plan)
    distill(whole, model, data, config)
    journal, stopped = _Memory(3), graft(model, plan)
    with pytest.raises(Interrupted):
        distill(stopped, model, data, config, journal=journal)
    assert [group.is_stacked for group in stopped.blocks] == [True, True]
    resumed = graft(model, plan)
    distill(resumed, model, data, config, journal=journal)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("entry", "layers"),
    [(Parallelize("pairs"), (1, 3)), (Parallelize([[1, 2]]), (0, 2, 3)), (Prune([1, 3]), (1, 3)),
     (Prune([0]), (1, 2, 3)), (Prune([0, 3]), (1, 3))],
)  # fmt: skip
def test_features_of_a_shallower_student_meet_the_teacher_s(
    model: nn.Module, data: ImageLabelDataset, entry: Any, layers: tuple[int, ...]
) -> None:
    student, family = graft(model, GraftPlan([entry])), family_of(model)
    assert family_and_model(student, model) is family
    assert family.feature_layers(student) == layers
    assert family.feature_layers(model) == (0, 1, 2, 3)
    batches = Batches(data, family, model, seed=0, purpose="f", label_dropout=0.0, device=torch.device("cpu"))
    batch = batches.at(torch.arange(4))
    output, features = family.predict_with_features(student, batch.x_t, batch.t, batch.cond, layers)
    assert torch.equal(output, student(batch.x_t, batch.t, batch.cond))
    assert tuple(features) == layers
    config = FinetuneConfig(objectives={"features": 1.0}, feature_outliers=0.0)
    loss, _ = mixed_loss(family, student, model, batch, config, layers)
    _, taught = family.predict_with_features(model, batch.x_t, batch.t, batch.cond, layers)
    errors: list[Tensor] = [
        (features[n] - taught[n]).square().sum(dim=(1, 2)) / taught[n].square().sum(dim=(1, 2))
        for n in layers
    ]
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_what_stage_2_trains(model: nn.Module) -> None:
    student = graft(model, GraftPlan([Parallelize([[0, 1]]), Replace("mlp", [2], "mlp", {"ratio": 2})]))
    family = family_of(student)
    found = {
        what: {name.split(".")[1] + name.split(".")[2][:3] for name in trained_parameters(family, student, what)
               if name.startswith("blocks")}
        for what in ("all", "blocks", "operators")
    }  # fmt: skip
    group = {"0bra", "0mer"}
    assert found["operators"] == {*group, "1mlp"}
    assert found["blocks"] == {*group, "1mlp", "1att", "1ada"}
    assert found["all"] == {*found["blocks"], "2mlp", "2att", "2ada"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stage_2_on_groups_as_one_is_that_on_groups_in_sequence(
    model: nn.Module, data: ImageLabelDataset, optimizer: str
) -> None:
    config = {
        "steps": 3,
        "batch_size": 8,
        "num_validation": 0,
        "optimizer": optimizer,
        "lr": 1e-3,
        "betas": (0.9, 0.9),
    }
    students = [graft(model, PAIRS) for _ in range(2)]
    for group in students[1].blocks:
        group.unstack()
    for student in students:
        finetune(student, data, config)
    torch.testing.assert_close(prediction(students[0]), prediction(students[1]), rtol=1e-3, atol=1e-3)


# ---- what ships


def test_the_recipes_of_depth_to_width() -> None:
    real, small, control = (
        load_recipe(name) for name in ("depth-to-width", "dit-fashion-depth-to-width", "dit-fashion-prune")
    )
    assert explain(load_model("arch:DiT-XL/2", device="meta"), real.graft_plan).depth == (28, 14)
    assert real.finetune is not None
    rates = {
        step: learning_rate(real.finetune, step) for step in (999, 74_999, 75_000, 149_999, 150_000, 229_999)
    }
    assert list(rates.values()) == [1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5, 2.5e-5]
    assert (real.fraction, real.finetune.batch_size, real.finetune.ema_decay) == (0.25, 256, 0.9999)
    assert small.distill is not None
    assert small.finetune is not None
    assert control.distill is None
    assert control.finetune is not None
    assert small.distill.steps + small.finetune.steps == control.finetune.steps
    model = load_model("dit-fashion")
    assert [explain(model, recipe.graft_plan).depth for recipe in (small, control)] == [(12, 6)] * 2


def test_the_study_gives_every_row_the_same_visits_and_shares_stage_1(
    model: nn.Module, data: ImageLabelDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = recipe_mapping(DEPTH_TO_WIDTH.recipe)
    visits = {}
    for row in DEPTH_TO_WIDTH.rows:
        recipe = row_recipe(DEPTH_TO_WIDTH, row, {}, base, seed=0)
        stages = [stage for stage in (recipe.distill, recipe.finetune) if stage is not None]
        visits[row.name] = sum(stage.steps * stage.batch_size for stage in stages)
    assert {visits[name] for name in visits if "stage-1" not in name and "teacher" not in name} == {600 * 64}
    assert {recipe.split("-s")[-1] for recipe in visits} == {"0", "1", "2"}

    shelf, stages = Shelf(tmp_path / "shelf"), []
    for name in ("first", "second"):
        recipe = load_recipe({
            "name": name, "model": "dit-fashion", "data": "fashion-10", "plan": PAIRS.to_dict()["entries"],
            "distill": STAGE_1, "finetune": None, "evaluate": None,
        })  # fmt: skip
        pipeline = Pipeline(recipe, RunFolder(tmp_path / name, Console()), _teacher=model, _data=data)
        pipeline.run = RunFolder.create(tmp_path / name, recipe.to_dict(), Console())
        shared_stage_1(pipeline, shelf)
        stages.append(
            (pipeline.run.result("distill"), pipeline.student().state_dict(), pipeline.run.metrics())
        )
    (first, weights, log), (second, same_weights, same_log) = stages
    assert first is not None
    assert second is not None
    assert second == {**first, "taken_over": True}
    assert [line for line in log if line["stage"] == "distill"] == same_log
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_the_study_s_tables() -> None:
    rows: list[dict[str, Any]] = []
    for row in DEPTH_TO_WIDTH.rows:
        way, _, seed = row.name.rpartition("-s")
        rows.append({
            "name": row.name, "distance": 6.0 + int(seed), "over_teacher": 1.0 + int(seed) / 10, "depth": 6,
            "start_error": {"random": {"blocks.0-1": 0.4 + int(seed) / 10}, "copied": {"blocks.0-1": 0.2},
                            "fitted": {"blocks.0-1": 0.1}} if way in ("concat", "residual") else None,
        })  # fmt: skip
    found = summarize(rows)
    means, concat, residual, published = found["tables"]
    assert means["rows"][0]["label"] == "teacher"
    assert means["rows"][1] | {"label": ""} == {
        "label": "", "seeds": 3, "seeds_over": 3, "distance": 7.0,
        "std": {"distance": 1.0, "over_teacher": pytest.approx(0.1)},
        "over_teacher": pytest.approx(1.1), "depth": 6, "model_params": None, "model_flops": None, "seconds": None,
    }  # fmt: skip
    assert concat["rows"] == [
        pytest.approx({"label": "blocks.0-1", "random": 0.5, "copied": 0.2, "fitted": 0.1})
    ]
    assert "sum of the updates" in str(residual["columns"])
    assert {(row["depth"], row["fid"]) for row in published["rows"]} >= {
        (14, 2.77),
        (28, 2.27),
        (21, 3.44),
        (24, 3.73),
    }
    assert len(found["findings"]) == 5
    assert summarize([{"name": "teacher-s0"}])["tables"][-1]["title"] == "Published"


def test_the_benchmark_compares_equal_models() -> None:
    found = run_benchmark("depth", size="S/8-D2", repeats=1, batch_size=1)
    rows = {row["branches"]: row for row in found["rows"]}
    assert list(rows) == ["teacher", "as one", "in sequence"]
    assert [row["depth"] for row in rows.values()] == [2, 1, 1]
    assert rows["as one"]["params"] - rows["teacher"]["params"] == 2 * 384**2 + 384
    assert rows["as one"]["params"] == rows["in sequence"]["params"]
    assert rows["teacher"]["speedup"] == 1.0
    with pytest.raises(GraftError, match="mode"):
        run_benchmark("depth", mode="fast")


def test_the_report_counts_all_blocks_of_a_group(model: nn.Module, tmp_path: Path) -> None:
    plan = GraftPlan([Parallelize([[0, 1]]), Prune([3])])
    run = RunFolder.create(
        tmp_path, {"name": "x", "model": "tiny", "plan": plan.to_dict()["entries"]}, Console()
    )
    run.finish("graft", explain(model, plan).to_dict())
    said = sentence(read_run(tmp_path))
    assert said.startswith(
        "In 2 of the 4 blocks of tiny (0, 1), 2 side by side, run as one (merge concat) take the"
    )
    assert said.endswith("in 1 of the 4 blocks (3), nothing takes the place of blocks.")
    assert "1 of 4 blocks are untouched" in write_report(tmp_path).read_text()

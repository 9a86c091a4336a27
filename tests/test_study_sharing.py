"""What the rows of a study share: operators that are distilled once, and a teacher that is asked once."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from several import held
from study_tools import QUIET, half, make_world, settings_of, tiny_study

from grafting import GraftPlan, distill, graft, load_model
from grafting.errors import DivergedError, Interrupted, RunError
from grafting.pipeline import Pipeline
from grafting.recipes import load_recipe
from grafting.recipes.rows import Row
from grafting.recipes.table import plan_of
from grafting.runs import RunFolder
from grafting.studies import row_run, run_rows, stage_1
from grafting.studies.shelf import Shelf
from grafting.studies.stage_1 import shared_stage_1
from grafting.surgery import edited_sites


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


# ---- operators are distilled once


def test_an_operator_is_the_same_whichever_others_learn_beside_it(world: Path) -> None:
    """Bit for bit, with clipping that bites, a rest of some operators, and both starts."""
    from grafting.data import load_dataset

    teacher, data = load_model(world / "model"), load_dataset(world / "data.npz")
    config = {"steps": 6, "batch_size": 8, "num_validation": 6, "validate_every": 1, "early_stop": 1, "clip": 0.01,
              "early_stop_tolerance": 0.02, "fit_samples": 8, "precision": "fp32", "warmup": 0}  # fmt: skip
    for init in ("donor", "random"):
        found = {}
        for layers in ([1], [0, 1, 2, 3]):
            plan = [
                *plan_of("mha", "hyena_x", layers, init=init),
                *plan_of("mlp", {"mlp": {"ratio": 3}}, layers),
            ]
            student = graft(teacher, GraftPlan.from_dict(plan[: len(layers)]))
            result = distill(student, teacher, data, config)
            found[len(layers)] = (student.blocks[1].attn.state_dict(), result.rested.get("blocks.1.attn"))
        alone, together = found[1], found[4]
        assert alone[1] == together[1]
        assert all(torch.equal(alone[0][key], together[0][key]) for key in alone[0])


def pipeline_of(world: Path, path: Path, plan: list[dict[str, Any]]) -> Pipeline:
    given = [text for text in settings_of(world) if not text.startswith("evaluate")]
    recipe = load_recipe({"plan": plan, "evaluate": None, "model": "x", "data": "y"}, given)
    pipeline = Pipeline(recipe, RunFolder(path))
    pipeline.run = RunFolder.create(path, recipe.to_dict(), QUIET)
    return pipeline


def test_a_row_takes_over_operators_and_ends_where_it_would_have(world: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    small, large = plan_of("mha", "swa", [1, 3]), plan_of("mha", "swa", [1, 2, 3], init="donor")
    shared_stage_1(pipeline_of(world, tmp_path / "small", small), shelf)
    pipeline = pipeline_of(world, tmp_path / "large", large)
    shared_stage_1(pipeline, shelf)
    whole = pipeline_of(world, tmp_path / "whole", large)
    whole.distill()
    state, wanted = (p.run.load_student(p.teacher).state_dict() for p in (pipeline, whole))
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    found, expected = (p.run.result("distill") for p in (pipeline, whole))
    assert found is not None
    assert expected is not None
    assert found["taken_over"] == ["blocks.1.attn", "blocks.3.attn"]
    for key in ("final_error", "start_error", "best_step", "steps", "image_visits", "flops", "rested"):
        assert found[key] == expected[key], key
    assert [line for line in pipeline.run.metrics() if line["stage"] == "distill"] == [
        line for line in whole.run.metrics() if line["stage"] == "distill"
    ]


def all_layers(operator: Any) -> Any:
    return lambda: [GraftPlan.from_dict(plan_of("mha", operator, "all"))]


def test_one_pass_of_the_teacher_serves_the_rows_of_an_operator(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row distills what others put into further layers; every row ends where it would have alone."""

    def row(name: str, plan: list[dict[str, Any]], **keys: Any) -> Row:
        return Row(name, name, {"plan": plan, "finetune": None}, **keys)

    rows = [
        row("half", plan_of("mha", "swa", [1, 3])),
        row("all", plan_of("mha", "swa", "all"), rank=1),
        row("other", plan_of("mha", {"swa": {"window": 2}}, "all"), rank=1),
        row("seed", plan_of("mha", "swa", [0, 1]), seed=1, rank=1),
        row("broken", plan_of("mha", "swa", [99]), rank=1),
        row("pairs", [{"parallelize": {"groups": "pairs"}}], rank=1),
    ]
    study, given, passes = tiny_study(*rows), settings_of(world), []
    plain = stage_1.distill

    def counted(student: Any, *rest: Any, **named: Any) -> Any:
        passes.append(len(edited_sites(student)))
        return plain(student, *rest, **named)

    monkeypatch.setattr(stage_1, "distill", counted)
    folder = tmp_path / "study"
    with pytest.raises(RunError, match=r"1 of 6 rows .*broken"):
        run_rows(study, folder, QUIET, changes=given)
    assert passes == [4, 4, 2]  # half and all at once, the other window, the other seed
    alone = tmp_path / "alone"
    for name in ("half", "all"):
        run_rows(study, alone, QUIET, changes=given, only=[name])
    assert passes == [4, 4, 2, 2, 2]  # one row is wanted: it distills for itself
    for name in ("half", "all"):
        both = [path / "rows" / name for path in (folder, alone)]
        found, wanted = (RunFolder(path, QUIET).read()["stages"]["distill"] for path in both)
        for key in ("final_error", "start_error", "best_step", "steps", "image_visits", "flops", "rested"):
            assert found[key] == wanted[key], key
        lines = [
            [line for line in RunFolder(path, QUIET).metrics() if line["stage"] == "distill"] for path in both
        ]
        assert lines[0] == lines[1]
        samples = [np.load(path / "samples/student.npz")["arr_0"] for path in both]
        assert np.array_equal(*samples)


@pytest.mark.parametrize(
    "error",
    [
        DivergedError("stage 1 diverged: the loss of blocks.0.attn is not finite"),
        RunError("mode cached needs more disk than there is"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_operators_of_other_rows_that_can_t_be_distilled_do_not_spoil_this_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The row goes on alone, with nothing left of the attempt, and no other row tries those operators for others."""
    plain, sizes, students = stage_1.distill, [], []

    def refuse(student: Any, *rest: Any, **named: Any) -> Any:
        sizes.append(len(edited_sites(student)))
        if sizes[-1] > 2:
            students.append(weakref.ref(student))
            named["journal"].save_checkpoint("distill", 1, {"step": 1}, 2)
            raise error
        error.__traceback__ = None  # this test holds the error, which would hold the student
        assert students[0]() is None
        return plain(student, *rest, **named)

    monkeypatch.setattr(stage_1, "distill", refuse)
    others, shelf = all_layers("swa"), Shelf(tmp_path / "shelf")
    for name, layers in (("first", [1, 3]), ("second", [1, 2])):
        pipeline = pipeline_of(world, tmp_path / name, plan_of("mha", "swa", layers))
        shared_stage_1(pipeline, shelf, others)
        assert pipeline.run.result("distill")["steps"] == 3  # type: ignore[index]
    assert sizes == [4, 2, 1]
    assert len(list((tmp_path / "shelf").glob("*.json"))) == 3


def test_a_step_that_another_row_s_operator_spoils_is_no_step_of_this_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grafting.training.pupils import Pupil

    plain, calls = Pupil.loss_on, []

    def loss_on(pupil: Pupil, tap: Any) -> torch.Tensor:
        calls.append(pupil.path)
        loss = plain(pupil, tap)
        if pupil.path == "blocks.0.attn" and calls.count(pupil.path) == 2:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    plan, states = plan_of("mha", "swa", [1, 3]), []
    monkeypatch.setattr(Pupil, "loss_on", loss_on)
    for name, others in (("alone", list), ("beside", all_layers("swa"))):
        pipeline = pipeline_of(world, tmp_path / name, plan)
        shared_stage_1(pipeline, Shelf(tmp_path / f"shelf-{name}"), others)
        states.append(pipeline.run.load_student(pipeline.teacher).state_dict())
        assert pipeline.run.result("distill")["skipped_steps"] == 0  # type: ignore[index]
    assert "blocks.0.attn" in calls
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_is_on_the_shelf_stays_as_it_is(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is killed when its log is put together, and stage 1 not called done, starts from its last step."""
    pipeline, shelf = pipeline_of(world, tmp_path / "row", plan_of("mha", "swa", [1, 3])), tmp_path / "shelf"
    finish = RunFolder.finish

    def killed(run: RunFolder, stage: str, result: Any) -> None:
        if stage == "distill":
            raise OSError("killed")
        finish(run, stage, result)

    monkeypatch.setattr(RunFolder, "finish", killed)
    with pytest.raises(OSError, match="killed"):
        shared_stage_1(pipeline, Shelf(shelf), all_layers("swa"))
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in shelf.iterdir()}
    assert all(json.loads(text)["log"] for name, text in before.items() if name.endswith(".json"))
    shared_stage_1(pipeline, Shelf(shelf), all_layers("swa"))
    assert {path.name: path.read_bytes() for path in shelf.iterdir()} == before


def test_rows_that_others_are_at_are_left_to_them(world: Path, tmp_path: Path) -> None:
    """By the lock of the row, and by what it noted that it trains."""
    rows = [Row("one", "one", half()), Row("all", "all", {"plan": plan_of("mha", "hyena_x", "all")})]
    setting = row_run.Setting.of(
        tiny_study(*rows), tmp_path, model=None, seed=0, device="cpu", changes=settings_of(world), wanted=rows
    )  # fmt: skip
    recipe = setting.recipe(rows[0])
    assert len(row_run._same_stage_1(setting, rows[0], recipe)) == 1
    folder = tmp_path / "rows" / "all"
    folder.mkdir(parents=True)
    with held(folder) as other:
        assert row_run._same_stage_1(setting, rows[0], recipe) == []
        other.kill()
    assert len(row_run._same_stage_1(setting, rows[0], recipe)) == 1
    shelf, other_row = Shelf(tmp_path / "shelf"), tmp_path / "rows" / "third"
    other_row.mkdir()
    done = pipeline_of(world, tmp_path / "rows" / "all-alone", plan_of("mha", "swa", [0, 2]))
    shared_stage_1(done, Shelf(tmp_path / "other-shelf"))  # noted, and not on the shelf yet
    shared_stage_1(
        pipeline_of(world, tmp_path / "rows" / "mine", plan_of("mha", "swa", [1])), shelf, all_layers("swa")
    )
    assert len(list((tmp_path / "shelf").glob("*.json"))) == 2  # layers 1 and 3


def test_a_row_that_distills_for_others_is_resumed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the other rows are no longer there to ask for it."""
    plan, others = plan_of("mha", "swa", [1, 3]), all_layers("swa")
    whole = pipeline_of(world, tmp_path / "a" / "row", plan)
    shared_stage_1(whole, Shelf(tmp_path / "shelf-a"), others)
    pipeline, shelf = pipeline_of(world, tmp_path / "b" / "row", plan), Shelf(tmp_path / "shelf-b")
    monkeypatch.setattr(RunFolder, "stop_requested", lambda run: 143 if run.metrics() else None)
    with pytest.raises(Interrupted):
        shared_stage_1(pipeline, shelf, others)
    monkeypatch.undo()
    shared_stage_1(pipeline, shelf)
    states = [p.run.load_student(p.teacher).state_dict() for p in (whole, pipeline)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    kept = [sorted(path.name for path in tmp_path.glob(f"shelf-{x}/*.safetensors")) for x in "ab"]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4


def test_what_an_operator_depends_on_is_in_its_key(world: Path, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    plan = plan_of("mha", "swa", [1])
    shared_stage_1(pipeline_of(world, tmp_path / "0", plan), shelf)
    changes: list[Any] = [
        plan_of("mha", "swa", [1], init="random"), plan_of("mha", "swa", [1], loss="l2"),
        plan_of("mha", {"swa": {"window": 2}}, [1]), plan_of("mha", "swa", [2]), plan_of("mha", "swa", [1], loss="l1"),
    ]  # fmt: skip
    taken = []
    for number, changed in enumerate(changes, 1):
        pipeline = pipeline_of(world, tmp_path / str(number), changed)
        shared_stage_1(pipeline, shelf)
        taken.append(len((pipeline.run.result("distill") or {})["taken_over"]))
    assert taken == [0, 0, 0, 0, 1]  # l1 is what a plan without a loss means


# ---- the teacher is asked once


def test_rows_share_what_the_teacher_predicts_and_the_last_clears_it_away(
    world: Path, tmp_path: Path
) -> None:
    one = {**half(), "distill": None}
    rows = [
        Row("one", "one", one), Row("two", "two", {**one, "plan": plan_of("mha", "swa", [0, 2])}, rank=1),
        Row("seed", "another seed", one, seed=1), Row("data", "less data", one, share=0.05),
    ]  # fmt: skip
    study, folder, given = tiny_study(*rows), tmp_path / "study", settings_of(world)
    given = [text for text in given if not text.startswith("fraction")]
    run_rows(study, folder, QUIET, changes=given, only=["one"])
    assert not list(folder.glob("shared/answers/*"))  # nobody else asks
    shutil.rmtree(folder / "rows" / "one")
    setting = row_run.Setting.of(study, folder, model=None, seed=0, device="cpu", changes=given, wanted=rows)
    for number in (0, 2, 3):  # of which the last two ask what nobody else asks
        row_run.run_row(setting, rows[number], QUIET)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shared/answers/*/*.safetensors")}
    assert len(kept) == 3  # one for each step
    row_run.run_row(setting, rows[1], QUIET)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("shared/answers/*/*.safetensors")} == kept
    run_rows(study, folder, QUIET, changes=given)
    assert not setting.answers.exists()
    alone = tmp_path / "alone"
    run_rows(study, alone, QUIET, changes=given, only=["two"])
    found = [np.load(path / "rows/two/samples/student.npz")["arr_0"] for path in (folder, alone)]
    assert np.array_equal(*found)

"""Studies: operators distilled once; rows that are resumed, refused, shared out or fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from study_tools import QUIET, half, settings_of, tiny_study

from grafting import GraftPlan, distill, graft, load_model, save_model
from grafting.errors import DivergedError, GraftError, RunError
from grafting.pipeline import Pipeline
from grafting.recipes import EXPERIMENTS, load_recipe
from grafting.recipes.rows import Claim, Row, UnavailableError, row_recipe
from grafting.recipes.table import plan_of, teacher_rows
from grafting.runs import RunFolder
from grafting.studies import row_run, run_rows, run_study, stage_1
from grafting.studies.findings import HOLDS
from grafting.studies.identity import identity_of
from grafting.studies.shelf import Shelf
from grafting.studies.stage_1 import shared_stage_1
from grafting.surgery import edited_sites
from grafting.training.loop import Interrupted


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of 32 x 32 pixels, tiny data, and a reference."""
    folder = tmp_path_factory.mktemp("world")
    teacher = tiny_dit(input_size=32, patch_size=8, hidden_size=16, depth=4, num_heads=2, num_classes=10)
    save_model(teacher, folder / "model")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, size=(60, 32, 32, 1), dtype=np.uint8)
    np.savez(folder / "data.npz", arr_0=images, arr_1=np.arange(60) % 10)
    return folder


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
    with subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time; from grafting.runs import FolderLock\n"
            "lock = FolderLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)",
            str(folder),
        ],
        stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
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


# ---- the machine


def test_a_study_from_start_to_end(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        *teacher_rows()[:2],
        Row("half", "half", half(), paper={"fid": 2.5}, rank=1),
        Row("broken", "broken", {"plan": plan_of("mha", "hyena_x", [99])}),
        Row("more", "more data", half(), share=0.2),
        Row("wild", "wild", {**half(), "finetune": {"objectives": {"diffusion": 1.0}}}, rank=2),
        Row("best", "best of two", best_of=("half",), seed=1, rank=3),
    )
    study = tiny_study(*rows, claims=(Claim("half is better than wild", (("half",), ("wild",))),))
    folder = tmp_path / "study"
    given = [text for text in settings_of(world) if not text.startswith("fraction")]
    given += ["finetune.lr=1e-4", "fraction=1.0"]

    def diverge(*args: Any, **kwargs: Any) -> Any:
        if args[2].objectives == {"diffusion": 1.0}:
            raise DivergedError("stage 2 diverged: loss nan")
        return finetune(*args, **kwargs)

    from grafting import pipeline as module

    finetune = module.finetune
    monkeypatch.setattr(module, "finetune", diverge)
    with pytest.raises(RunError, match=r"1 of 7 rows .*broken.*--resume"):
        run_rows(study, folder, QUIET, changes=given)
    data = json.loads((folder / "study.json").read_text())
    found = {row["name"]: row for row in data["rows"]}
    assert "layer 99" in found["broken"]["status"] or "99" in found["broken"]["status"]
    assert found["wild"]["diverged"]
    assert found["half"]["paper_over"] == 1.25
    assert found["half"]["over_teacher"] == pytest.approx(
        found["half"]["distance"] / found["teacher"]["distance"]
    )
    assert found["best"]["seed"] == 1
    assert found["best"]["distance"] != found["half"]["distance"]
    assert data["noise"]["seeds"] == 2
    assert [claim["verdict"] for claim in data["claims"]] == [HOLDS]
    page = (folder / "study.html").read_text()
    assert "half is better than wild" in page
    assert "diverged" in page
    # the teacher's samples are drawn once a seed; the same noise in every row
    teacher = np.load(folder / "rows/teacher/samples/student.npz")["arr_0"]
    assert np.array_equal(np.load(folder / "rows/half/samples/teacher.npz")["arr_0"], teacher)
    assert (folder / "rows/teacher/samples/student.npz").samefile(folder / "rows/half/samples/teacher.npz")

    before = {path: path.stat().st_mtime_ns for path in folder.glob("rows/*/result.json")}
    with pytest.raises(RunError, match="1 of 7"):
        run_rows(study, folder, QUIET, changes=given)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("rows/*/result.json")} == before

    other = tmp_path / "other"
    monkeypatch.setattr(row_run, "_sample", lambda *_: pytest.fail("the teacher's samples are there already"))
    run_rows(study, other, QUIET, changes=given, only=["half", "teacher"], reuse=[folder])
    setting = row_run.Setting.of(
        study, other, model=None, seed=0, device="cpu", changes=given, reuse=[folder]
    )
    pipeline = Pipeline(setting.recipe(study.row("half")), RunFolder(other / "rows/half", QUIET))
    assert np.array_equal(np.load(row_run.teacher_samples(setting, pipeline))["arr_0"], teacher)
    result = json.loads((other / "rows/half/result.json").read_text())
    assert result["taken_from"] == "study/half"
    assert json.loads((other / "rows/teacher/result.json").read_text())["taken_from"] == "study/teacher"
    assert (other / "study.html").is_file()


def test_a_row_that_is_stopped_anywhere_goes_on_to_the_same_result(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(Row("half", "half", half()))
    run_rows(study, tmp_path / "whole", QUIET, changes=settings_of(world))
    wanted = np.load(tmp_path / "whole/rows/half/samples/student.npz")["arr_0"]
    asked = []

    def stop(self: RunFolder) -> int | None:
        asked.append(1)
        return 143 if len(asked) == 2 else None  # stage 1, before its second step; later in stage 2

    monkeypatch.setattr(RunFolder, "stop_requested", stop)
    for _ in range(3):
        with pytest.raises(Interrupted) as stopped:
            run_rows(study, tmp_path / "cut", QUIET, changes=settings_of(world))
        assert stopped.value.code == 143
        assert "not run" in (tmp_path / "cut/study.html").read_text()
        asked.clear()
    monkeypatch.undo()
    run_rows(study, tmp_path / "cut", QUIET, changes=settings_of(world))
    assert np.array_equal(np.load(tmp_path / "cut/rows/half/samples/student.npz")["arr_0"], wanted)


def test_other_settings_are_refused_in_a_begun_row(world: Path, tmp_path: Path) -> None:
    study = tiny_study(teacher_rows()[0])
    run_rows(study, tmp_path, QUIET, changes=settings_of(world))
    (tmp_path / "rows/teacher/result.json").unlink()
    with pytest.raises(RunError, match="failed"):
        run_rows(study, tmp_path, QUIET, changes=[*settings_of(world), "sample.steps=2"])
    assert "sample" in json.loads((tmp_path / "failures/teacher.json").read_text())["error"]


def test_rows_of_other_settings_are_refused_beside_finished_ones(world: Path, tmp_path: Path) -> None:
    """One table has one protocol, whatever --only names."""
    study = tiny_study(teacher_rows()[0], Row("half", "half", half()))
    run_rows(study, tmp_path, QUIET, changes=settings_of(world), only=["teacher"])
    with pytest.raises(RunError, match=r"'teacher' was begun with other settings \(different: sample\)"):
        run_rows(study, tmp_path, QUIET, changes=[*settings_of(world), "sample.steps=2"], only=["half"])
    assert not (tmp_path / "rows/half").exists()
    run_rows(study, tmp_path, QUIET, changes=[*settings_of(world), "name=other"], only=["teacher"])


def test_what_fails_before_any_work_does_not_bind_a_row(world: Path, tmp_path: Path) -> None:
    study = tiny_study(teacher_rows()[0])
    with pytest.raises(RunError, match="failed"):
        run_rows(study, tmp_path, QUIET, changes=[*settings_of(world), "evaluate.reference=typo.npz"])
    run_rows(study, tmp_path, QUIET, changes=settings_of(world))
    assert (tmp_path / "rows/teacher/result.json").is_file()
    with pytest.raises(RunError, match="leave evaluate"):
        run_rows(study, tmp_path / "new", QUIET, changes=[*settings_of(world), "evaluate=null"])
    with pytest.raises(RunError, match="no folder of a study"):
        run_rows(study, tmp_path / "new", QUIET, changes=settings_of(world), reuse=[world])


def test_teacher_samples_are_those_of_the_sampler_in_use(world: Path, tmp_path: Path) -> None:
    found = []
    for steps in (1, 2):  # no row is finished in between, so the second settings are allowed
        recipe = load_recipe("table4/mha-swa-50", [*settings_of(world), f"sample.steps={steps}"])
        setting = row_run.Setting(tiny_study(), tmp_path)
        run = RunFolder(tmp_path / "rows/a", QUIET)
        found.append(np.load(row_run.teacher_samples(setting, Pipeline(recipe, run)))["arr_0"])
    assert not np.array_equal(*found)


def test_a_locality_file_is_known_by_its_content(world: Path, tmp_path: Path) -> None:
    row = Row("local", "local", {"plan": plan_of("mha", "hyena_x", "top-local-50")})
    given = [*settings_of(world), "distill=null", "finetune=null"]
    file = {"layers": [{"layer": n, "k": {"8": 0.1 * n}} for n in range(4)]}
    known = []
    for place in ("a", "b"):
        path = tmp_path / place / "locality.json"
        path.parent.mkdir()
        path.write_text(json.dumps(file))
        recipe = row_recipe(tiny_study(row), row, {"locality": str(path), **row_run.parse_overrides(given)})
        known.append(identity_of(row, recipe))
    assert known[0] == known[1]


def test_what_a_user_sets_does_not_make_a_row_another(tmp_path: Path) -> None:
    scale, budget = EXPERIMENTS["data-scale"], EXPERIMENTS["equal-budget"]
    with pytest.raises(UnavailableError, match="leave fraction out"):
        row_recipe(scale, scale.row("mha-self-data20"), {"fraction": 1.0})
    assert row_recipe(scale, scale.row("mha-self-data10"), {"fraction": 1.0}).fraction == 1.0
    for name in ("mha-hyena_x-ours-s0", "mha-hyena_x-paper-lr1e-4"):
        without = row_recipe(budget, budget.row(name), {"distill": None, "finetune": None})
        assert (without.distill, without.finetune) == (None, None)
    third = load_recipe("equal-budget/mha-hyena_x-third-s1", ["finetune.steps=300", "seed=7"])
    assert third.finetune is not None
    assert (third.finetune.steps, third.seed) == (100, 8)


def test_a_folder_with_a_study_needs_resume(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(RunError, match="--resume"):
        run_study("table4", tmp_path, QUIET)
    with pytest.raises(RunError, match="table4"):
        run_study("table5", tmp_path / "new", QUIET)
    with pytest.raises(RunError, match="mha-swa-50"):
        run_study("table4", tmp_path / "new", QUIET, only=["nothing"])
    with pytest.raises(RunError, match="stepps"):
        run_study("table4", tmp_path / "new", QUIET, changes=["finetune.stepps=3"])
    with pytest.raises(RunError, match="paper-code"):
        run_study("table4", tmp_path / "new", QUIET, changes=["preset=papers"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["model=nope", "data=nope.npz"])
def test_a_teacher_or_data_that_is_not_there_is_one_error_before_any_row(
    world: Path, tmp_path: Path, change: str
) -> None:
    study, good = tiny_study(*teacher_rows()[:1], Row("half", "half", half())), settings_of(world)
    with pytest.raises(GraftError, match="nope"):
        run_rows(study, tmp_path / "new", QUIET, changes=[*good, change])
    assert not (tmp_path / "new").exists()
    rows = (Row("other", "other", {"model": "nope", **half()}), teacher_rows()[0])  # a row's own fails alone
    with pytest.raises(RunError, match=r"1 of 2 rows .* failed \(other\)"):
        run_rows(tiny_study(*rows), tmp_path / "own", QUIET, changes=good)
    assert (tmp_path / "own/rows/teacher/result.json").is_file()


def test_several_processes_share_the_rows(world: Path, tmp_path: Path) -> None:
    rows = (
        *teacher_rows()[:2],
        Row("half", "half", half(), rank=1),
        Row("other", "other", half(loss="l2"), rank=1),
    )
    run_rows(tiny_study(*rows), tmp_path, QUIET, changes=settings_of(world), jobs=2)
    logs = [path.read_text() for path in sorted((tmp_path / "logs").iterdir())]
    assert len(logs) == 2
    for row in rows:  # each was done, and by one of the two
        assert (tmp_path / "rows" / row.name / "result.json").is_file()
        assert sum(f"== {row.name} done" in log for log in logs) == 1


def test_a_row_in_other_hands_is_left_to_them(world: Path, tmp_path: Path) -> None:
    rows = teacher_rows()[:2]
    held = tmp_path / "rows" / rows[0].name
    held.mkdir(parents=True)
    script = (
        "import sys; from grafting.runs import FolderLock; "
        f"lock = FolderLock({str(held)!r}); lock.acquire(); print('held', flush=True); sys.stdin.readline()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other, other.stdin, other.stdout:
        assert other.stdout.readline() == "held\n"
        run_rows(tiny_study(*rows), tmp_path, QUIET, changes=settings_of(world))
        assert not (held / "result.json").exists()
        assert (tmp_path / "rows" / rows[1].name / "result.json").is_file()
        other.kill()
        other.wait()
    run_rows(tiny_study(*rows), tmp_path, QUIET, changes=settings_of(world))  # a dead process holds nothing
    assert (held / "result.json").is_file()


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a row but for times, pages and pictures."""
    left_out = {"run.json", "result.json", "status.json", "run.lock"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left_out and path.suffix not in (".html", ".png")
    }


def test_a_finetuned_teacher_s_row_that_was_killed_ends_as_if_it_had_not_been(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training, before its samples: its weights are in checkpoints alone. Left-overs of a killed writer go."""
    row = Row("teacher-finetuned", "teacher, finetuned", teacher="finetuned")
    sample = row_run._sample

    class Killed(BaseException):
        pass

    def kill(*arguments: Any) -> None:
        raise Killed

    run_rows(tiny_study(row), tmp_path / "whole", QUIET, changes=settings_of(world))
    monkeypatch.setattr(row_run, "_sample", kill)
    with pytest.raises(Killed):
        run_rows(tiny_study(row), tmp_path / "cut", QUIET, changes=settings_of(world))
    folder = tmp_path / "cut" / "rows" / row.name
    assert list(folder.glob("checkpoints/finetune/*.pt"))
    for name in (".result.json.x.tmp", "checkpoints/finetune/.000000009.pt.x.tmp"):
        (folder / name).write_text("")
    monkeypatch.setattr(row_run, "_sample", sample)
    run_rows(tiny_study(row), tmp_path / "cut", QUIET, changes=settings_of(world))
    found = contents(folder)
    assert found == contents(tmp_path / "whole" / "rows" / row.name)
    assert not [name for name in found if name.endswith((".pt", ".tmp"))]
    assert {"samples/student.npz", "metrics.jsonl"} <= found.keys()


def test_rows_are_measured_against_other_samples_of_the_teacher(world: Path, tmp_path: Path) -> None:
    study = tiny_study(Row("teacher", "teacher", teacher="as it is"), Row("half", "half", half()))
    given = [text for text in settings_of(world) if not text.startswith("evaluate")]
    run_rows(study, tmp_path, QUIET, changes=[*given, "evaluate.reference=teacher"])
    drawn = {
        path.parent.name.rsplit("-", 1)[0]: path
        for path in (tmp_path / "shared" / "teacher").glob("*/samples.npz")
    }
    assert set(drawn) == {"seed-0", "seed-1000003"}
    rows = {row["name"]: row for row in json.loads((tmp_path / "study.json").read_text())["rows"]}
    assert all(row["distance"] > 0 for row in rows.values())
    assert (tmp_path / "rows" / "half" / "samples" / "reference.npz").samefile(drawn["seed-1000003"])

"""Studies: rows that are resumed, refused, shared out or fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from several import held
from study_tools import QUIET, half, make_world, settings_of, tiny_study

from grafting.errors import DivergedError, GraftError, Interrupted, RunError
from grafting.pipeline import Pipeline
from grafting.recipes import EXPERIMENTS, load_recipe
from grafting.recipes.rows import Claim, Row, UnavailableError, row_recipe
from grafting.recipes.table import plan_of, teacher_rows
from grafting.runs import RunFolder
from grafting.studies import row_run, run_rows, run_study
from grafting.studies.findings import HOLDS
from grafting.studies.identity import identity_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


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
    teacher = Row("teacher", "teacher", {"model": str(world / "model")}, teacher="as it is")
    rows = (Row("other", "other", {"model": "nope", **half()}), teacher)  # a row's own fails alone
    without = [text for text in good if not text.startswith("model=")]
    with pytest.raises(RunError, match=r"1 of 2 rows .* failed \(other\)"):
        run_rows(tiny_study(*rows), tmp_path / "own", QUIET, changes=without)
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
    held_row = tmp_path / "rows" / rows[0].name
    held_row.mkdir(parents=True)
    with held(held_row) as other:
        run_rows(tiny_study(*rows), tmp_path, QUIET, changes=settings_of(world))
        assert not (held_row / "result.json").exists()
        assert (tmp_path / "rows" / rows[1].name / "result.json").is_file()
        other.kill()
    run_rows(tiny_study(*rows), tmp_path, QUIET, changes=settings_of(world))  # a dead process holds nothing
    assert (held_row / "result.json").is_file()


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

"""`graft study NAME --dry-run`: which rows would run, what is counted once, and that nothing is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Graft, caller
from hypothesis import given
from hypothesis import strategies as st
from study_tools import QUIET, half, make_world, settings_of, tiny_study

from grafting import needs
from grafting.analysis import pace
from grafting.errors import RunError
from grafting.families import family_of
from grafting.loading import load_model
from grafting.pipeline import Pipeline
from grafting.recipes.rows import Row, Study
from grafting.recipes.table import plan_of
from grafting.runs import RunFolder
from grafting.studies import rehearse_study, run_rows
from grafting.studies.identity import identity_of, record_identity
from grafting.studies.rehearsal import _span, in_words
from grafting.studies.row_run import Setting
from grafting.studies.runner import dry_rows

FORWARD, BOTH = 2.0, 5.0  # seconds of one operator and one image, as the stopwatch of these tests has them
VISITS = 3 * 8
HALF = Row("half", "Half", half())
MORE = Row("more", "More", {"plan": plan_of("mha", "hyena_x", "interleaved-75")})
OTHER = Row("other", "Other", {"plan": plan_of("mha", "swa", "interleaved-50")})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _a_stopwatch_that_always_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace.Stopwatch, "_measure", lambda *_: pace.Pace(FORWARD, BOTH))
    monkeypatch.setattr(pace.Stopwatch, "update", lambda *_: 0.0)
    monkeypatch.setattr("grafting.studies.rehearsal.usable_cores", lambda: 2)


def rehearsed(study: Study, world: Path, folder: Path, *changes: str, **options: Any) -> dict[str, Any]:
    found = dry_rows(study, folder, changes=[*settings_of(world), *changes], **options)
    assert json.loads(json.dumps(found)) == found
    assert list(in_words(found))
    return found


def seconds_of(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {row["name"]: row["seconds"] for row in found["rows"] if "seconds" in row}


def test_what_rows_share_is_counted_once(world: Path, tmp_path: Path) -> None:
    output = ["finetune.objectives={output: 1.0}", "distill.fit_readout=false"]
    study = tiny_study(Row("teacher", "Teacher", {}, teacher="as it is"), HALF, MORE, OTHER)
    found = rehearsed(study, world, tmp_path / "out", *output, jobs=2)
    assert not (tmp_path / "out").exists()
    assert [row["state"] for row in found["rows"]] == ["to do"] * 4
    times = seconds_of(found)

    alone = {name: rehearsed(tiny_study(row), world, tmp_path / "out", *output) for name, row in
             {"half": HALF, "more": MORE, "other": OTHER}.items()}  # fmt: skip
    own = {name: seconds_of(one)[name] for name, one in alone.items()}
    model = load_model(world / "model")
    # All but the operators goes by FLOPs: here the teacher's pass is this many seconds an image.
    family = family_of(model)
    counted = sum(site.cost.total for site in family.sites(model))
    passed = len(family.sites(model)) * FORWARD * family.flops_per_image(model) / counted

    assert times["teacher"] == {
        "sample": pytest.approx(6 * 2 * passed)
    }  # guidance doubles each of 6 one-step draws
    # Stage 1: the first row of an operator trains it for the other, too, in as many passes of the teacher.
    assert times["half"]["distill"] == pytest.approx(own["more"]["distill"])
    assert times["more"]["distill"] == 0
    assert times["other"]["distill"] == pytest.approx(own["other"]["distill"])
    # Stage 2: the first row asks the teacher.
    assert times["half"]["finetune"] == pytest.approx(own["half"]["finetune"])
    for name in ("more", "other"):
        assert times[name]["finetune"] == pytest.approx(own[name]["finetune"] - VISITS * passed)
    # The teacher's samples are those of its own row.
    for name in ("half", "more", "other"):
        assert times[name]["sample"] == pytest.approx(own[name]["sample"] - times["teacher"]["sample"])

    work = sum(sum(stages.values()) for stages in times.values())
    assert found["work_seconds"] == pytest.approx(work)
    assert work / 2 <= found["elapsed_seconds"] < work
    more = rehearsed(study, world, tmp_path / "out", *output, jobs=8)  # than the machine has cores
    assert more["elapsed_seconds"] == pytest.approx(found["elapsed_seconds"])
    assert any(line.startswith("more ") and "stage 1" not in line for line in in_words(found))


def test_rows_that_ask_otherwise_share_nothing(world: Path, tmp_path: Path) -> None:
    seeded = Row("seeded", "Another seed", half(), seed=1)
    features = Row("features", "Features", {**half(), "finetune": {"objectives": {"features": 1.0}}})
    found = rehearsed(tiny_study(HALF, seeded, features), world, tmp_path)  # by `output`, as the preset says
    times = seconds_of(found)
    assert times["seeded"] == pytest.approx(times["half"])
    assert times["features"]["finetune"] == pytest.approx(times["half"]["finetune"])
    assert times["features"]["distill"] == 0  # the same up to there


def test_more_visits_than_were_answered_ask_the_teacher(world: Path, tmp_path: Path) -> None:
    longer = Row("longer", "Three times", half(), times={"finetune.steps": 3.0})
    output = "finetune.objectives={output: 1.0}"
    times = seconds_of(rehearsed(tiny_study(HALF, longer, HALF), world, tmp_path, output))
    alone = seconds_of(rehearsed(tiny_study(longer), world, tmp_path, output))["longer"]["finetune"]
    again = seconds_of(rehearsed(tiny_study(longer, HALF), world, tmp_path, output))["half"]["finetune"]
    asked = seconds_of(rehearsed(tiny_study(HALF), world, tmp_path, output))["half"]["finetune"] - again
    assert asked > 0
    assert times["longer"]["finetune"] == pytest.approx(alone - asked)


def test_what_is_done_is_not_done_again(world: Path, tmp_path: Path) -> None:
    study = tiny_study(Row("teacher", "Teacher", {}, teacher="as it is"), HALF, MORE, OTHER)
    fresh = rehearsed(study, world, tmp_path / "none")
    folder = tmp_path / "study"
    run_rows(study, folder, QUIET, only=["teacher", "half"], changes=settings_of(world))
    setting = Setting.of(study, folder, model=None, seed=0, device="cpu", changes=settings_of(world))
    recipe = setting.recipe(OTHER)
    begun = Pipeline(recipe, RunFolder.create(setting.row_folder("other"), recipe.to_dict(), QUIET))
    begun.graft()
    begun.distill()
    record_identity(setting.row_folder("other"), identity_of(OTHER, recipe), "other")

    found = rehearsed(study, world, folder)
    assert [(row["state"], sorted(row.get("seconds", {}))) for row in found["rows"]] == [
        ("done", []), ("done", []), ("to do", ["distill", "finetune", "sample"]), ("to do", ["finetune", "sample"]),
    ]  # fmt: skip
    assert next(iter(in_words(found))) == "teacher  done"
    before, now = seconds_of(fresh), seconds_of(found)
    assert now["more"]["sample"] == before["more"]["sample"]  # the teacher's are there
    one = plan_of("mha", "hyena_x", [2])
    alone = seconds_of(rehearsed(tiny_study(Row("one", "One", {"plan": one})), world, tmp_path))["one"]
    assert now["more"]["distill"] == pytest.approx(alone["distill"])  # of three operators two are there

    # What has gone since a row was done is missing for the others.
    reference = "evaluate.reference=gone.npz"
    with pytest.raises(RunError, match="begun with other settings"):
        rehearsed(study, world, folder, reference)
    (world / "data.npz").rename(world / "away.npz")
    try:
        missing = rehearsed(study, world, folder)["missing"]
    finally:
        (world / "away.npz").rename(world / "data.npz")
    assert missing == [f"data: {world / 'data.npz'}", f"evaluate.reference: {world / 'data.npz'}"]
    # Another study may take over what is done.
    taken = rehearsed(study, world, tmp_path / "none", reuse=[folder])["rows"]
    assert (taken[1]["why"], taken[1]["seconds"]) == ("taken over from study/half", {})
    # Other settings are refused for what is done, and said of what has begun.
    with pytest.raises(RunError, match="begun with other settings"):
        rehearsed(study, world, folder, "distill.steps=4")
    other = rehearsed(tiny_study(OTHER), world, folder, "distill.steps=4")["rows"][0]
    assert other["state"] == "would fail"
    assert "begun with other settings (different: distill)" in other["why"]


def test_what_is_not_known_before_is_said(world: Path, tmp_path: Path) -> None:
    local = Row("local", "By locality", {"plan": plan_of("mha", "swa", "top-local-50")})
    large = Row("large", "More data", half(), share=0.2)
    beyond = Row("beyond", "No such layer", {"plan": plan_of("mha", "swa", [9])})
    best = Row("best", "The best", {}, best_of=("half",))
    study = tiny_study(local, HALF, best, beyond, large)
    found = rehearsed(study, world, tmp_path, "finetune.objectives={diffusion: 1.0}")
    rows = {row["name"]: row for row in found["rows"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "local": "to do", "half": "to do", "best": "to do", "beyond": "would fail", "large": "left out",
    }  # fmt: skip
    assert "locality" in rows["local"]["why"]
    assert rows["best"]["why"] == "as if half were the best"
    assert rows["best"]["seconds"]["finetune"] == rows["half"]["seconds"]["finetune"]
    assert "layer 9 does not exist" in rows["beyond"]["why"]
    assert "20%" in rows["large"]["why"]
    assert any(line.endswith(" from start to end, without 1 of them") for line in in_words(found))


def test_losses_that_are_measured_are_shared_with_no_other_row(world: Path, tmp_path: Path) -> None:
    times = seconds_of(
        rehearsed(tiny_study(HALF, MORE), world, tmp_path, "distill.losses={mha: auto, mlp: l2}")
    )
    assert 0 < times["half"]["distill"] < times["more"]["distill"]


def test_what_is_missing_is_said_once(world: Path, tmp_path: Path) -> None:
    found = rehearsed(
        tiny_study(HALF, OTHER), world, tmp_path, "data=nowhere.npz", "evaluate.reference=nothing.npz"
    )
    assert found["missing"] == ["data: nowhere.npz", "evaluate.reference: nothing.npz"]
    assert "missing: data: nowhere.npz" in list(in_words(found))


def test_what_hardly_fits_is_said_once_of_an_operator(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "total_bytes", lambda device: 10**5)
    warnings = rehearsed(tiny_study(HALF, MORE, OTHER), world, tmp_path)["warnings"]
    assert {line.split(":")[0] for line in warnings} == {"half", "other"}
    assert warnings[0].startswith("half: distill will hardly fit: it needs about ")


@given(st.lists(st.floats(0, 1e6), max_size=20), st.integers(1, 8))
def test_rows_at_a_time_take_no_less_than_their_share(seconds: list[float], jobs: int) -> None:
    longest, share = max(seconds, default=0), sum(seconds) / jobs
    assert max(longest, share) <= _span(seconds, jobs) * (1 + 1e-9) + 1e-9
    assert _span(seconds, jobs) <= (share + longest) * (1 + 1e-9)
    assert _span(seconds, 1) == pytest.approx(sum(seconds))


def test_the_command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Graft = caller(tmp_path, monkeypatch, capsys)
    command = (
        "study",
        "table4",
        "--only",
        "mha-hyena_x-50",
        "--only",
        "mha-hyena_x-75",
        "--out",
        tmp_path / "new",
    )
    code, text, _ = run(*command, "--dry-run")
    assert code == 0
    lines = text.splitlines()
    assert lines[0].startswith("mha-hyena_x-50  to do: stage 1 ")
    assert lines[1].startswith("mha-hyena_x-75  to do: stage 2 ")
    assert ": 2 of 2 rows to do, " in lines[2]
    code, text, _ = run(*command, "--dry-run", "--json")
    assert (code, len(json.loads(text)["rows"])) == (0, 2)
    assert not (tmp_path / "new").exists()
    (tmp_path / "held" / "rows").mkdir(parents=True)
    held = ("study", "table4", "--only", "teacher", "--dry-run", "--out", tmp_path / "held")
    assert "already holds a study; go on with --resume" in run(*held)[2]
    assert run(*held, "--resume")[0] == 0
    assert run(*command, "--json")[2] == "error: --json is for --dry-run: a study writes study.json\n"
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "is work for one process" in run(*command, "--dry-run")[2]
    for name, said in {"donor-init": "has no rows to look at", "table5": "unknown study"}.items():
        with pytest.raises(RunError, match=said):
            rehearse_study(name, tmp_path / "new")

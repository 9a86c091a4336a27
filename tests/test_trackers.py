"""Trackers: what they get, that they are off by default, and that they never end a run."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from several import together
from tiny_runs import STAGE, run_as_one_of_several, tiny_pipeline, tiny_recipe

from grafting.console import Console
from grafting.errors import RunError
from grafting.recipes import load_recipe
from grafting.runs import RunFolder
from grafting.runs.trackers import check_trackers


class Recording(GeneralTracker):
    """A tracker by accelerate's own interface that keeps what it gets."""

    name = "trackio"
    requires_logging_directory = False
    main_process_only = False
    made: list[Recording] = []
    fails_at = ""

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self.config: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False
        Recording.made.append(self)

    @property
    def tracker(self) -> list[Any]:
        return self.rows

    def start(self) -> None:
        if self.fails_at == "start":
            raise ConnectionError("no such host")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self.fails_at == "log" and len(self.rows) == 2:
            raise RuntimeError("the server\nis gone")
        self.rows.append((step, values))

    def finish(self) -> None:
        if self.fails_at == "finish":
            raise OSError("can't flush")
        self.finished = True


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recording)
    monkeypatch.setattr(tracking, "_available_trackers", ["trackio"])
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setattr(Recording, "fails_at", "")
    return Recording


def test_a_tracker_gets_every_number_of_the_log(tmp_path: Path, recording: type[Recording]) -> None:
    pipeline = tiny_pipeline(tmp_path, trackers=["trackio"])
    pipeline.all()
    (tracker,) = recording.made
    assert tracker.project == "grafting"
    assert tracker.finished
    assert json.loads(tracker.config["recipe"])["trackers"] == ["trackio"]
    assert tracker.config["finetune/steps"] == STAGE["steps"]
    steps = [step for step, _ in tracker.rows if step is not None]
    assert steps == sorted(steps)
    sent = {(step, name): value for step, values in tracker.rows for name, value in values.items()}
    for record in pipeline.run.metrics():
        if record["stage"] == "finetune" and "event" not in record:
            step = record["step"] + STAGE["steps"]
            assert sent[step, "finetune/loss"] == record["loss"]
            for term, value in record["terms"].items():
                assert sent[step, f"finetune/terms/{term}"] == value
        if record["stage"] == "distill" and record.get("event") == "validation":
            for path, error in record["error"].items():
                assert sent[record["step"], f"distill/validation/error/{path}"] == error
    assert {step for step, name in sent if name.startswith("distill/loss/")} == {1, 2, 3, 4}


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_changes_nothing(
    tmp_path: Path, recording: type[Recording], moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.fails_at = moment
    pipeline = tiny_pipeline(tmp_path, trackers=["trackio"], finetune=None)
    pipeline.run.console = Console()
    pipeline.distill()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: tracker trackio failed and is left out, the run goes on: ")
    assert pipeline.run.result("distill") is not None
    assert len(recording.made[0].rows) == {"start": 0, "log": 2, "finish": 7}[moment]


def test_a_resumed_run_goes_on_under_its_name_and_the_key_may_change(
    tmp_path: Path, recording: type[Recording]
) -> None:
    tiny_pipeline(tmp_path, trackers=[]).distill()
    assert recording.made == []
    assert not (tmp_path / "run" / "trackers.json").exists()
    for _ in range(2):
        pipeline = tiny_pipeline(tmp_path, resume=True, trackers=["trackio"])
        pipeline.run.log({"stage": "finetune", "step": 0, "loss": 1.0})
        with pipeline.run.writing():
            pass
    first, second = recording.made
    assert first.options == second.options
    assert first.options["name"].startswith("run-")


def test_only_the_process_that_writes_tracks(tmp_path: Path, recording: type[Recording]) -> None:
    tiny_pipeline(tmp_path, trackers=["trackio"])
    RunFolder(tmp_path / "run", writer=False).log({"stage": "distill", "step": 1, "loss": 1.0})
    assert recording.made == []


class PerProcess(Recording):
    """One that leaves to accelerate which process it is for, as tensorboard's and wandb's classes do."""

    main_process_only = True

    @tracking.on_main_process
    def start(self) -> None:
        pass

    @tracking.on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        super().log(values, step)


def spread_run(folder: Path, recipe: dict[str, Any], recorded: bool) -> list[tuple[int | None, list[str]]]:
    """The recipe as one of several processes; what a tracker got in this one."""
    os.environ.pop("OMP_NUM_THREADS", None)  # else accelerate would leave the number of threads (1) as it is
    before = dict(os.environ)
    if recorded:
        tracking.LOGGER_TYPE_TO_CLASS["trackio"] = PerProcess
        tracking._available_trackers = ["trackio"]
        PerProcess.made = Recording.made = []
    run_as_one_of_several(recipe, folder)
    assert torch.get_num_threads() == 1
    assert dict(os.environ) == before
    return [(step, sorted(values)) for tracker in Recording.made for step, values in tracker.rows]


def test_of_two_processes_the_first_alone_tracks_and_each_line_once(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, trackers=["trackio"], finetune={"shard": "full"})
    first, second = together(2, spread_run, tmp_path / "run", recipe, True)
    assert second == []
    assert isinstance(first, list), first
    records = RunFolder(tmp_path / "run").metrics()
    assert len(first) == len(records)
    training = Counter((r["stage"], r["step"]) for r in records if "event" not in r)
    assert training == {
        (stage, n): 1 for stage in ("distill", "finetune") for n in range(1, STAGE["steps"] + 1)
    }
    lines = Counter(step for step, names in first if any(n.split("/")[1] == "lr" for n in names))
    assert lines == dict.fromkeys(range(1, 2 * STAGE["steps"] + 1), 1)


def test_a_tracker_that_is_unknown_or_not_there_is_an_error_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(RunError, match=r"trackers: wandb is not installed.*pip install wandb"):
        tiny_pipeline(tmp_path, trackers=["wandb"]).check()
    with pytest.raises(RunError, match="unknown tracker 'mlflow'"):
        check_trackers(["mlflow"])
    with pytest.raises(RunError, match=r"trackers\.0='all'"):
        load_recipe({"model": "m", "data": "d", "plan": [], "trackers": ["all"]})


def test_tensorboard_files_hold_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pipeline = tiny_pipeline(tmp_path, trackers=["tensorboard"])
    pipeline.distill()
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    (path,) = pipeline.run.metrics()[-1]["error"]
    events = log.Scalars(f"distill/loss/{path}")
    losses = [r["loss"][path] for r in pipeline.run.metrics() if "event" not in r]
    assert [event.value for event in events] == pytest.approx(losses)


def test_two_processes_leave_one_tensorboard_file_with_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe(tmp_path, trackers=["tensorboard"])
    assert together(2, spread_run, tmp_path / "run", recipe, False) == [[], []]
    assert len(list((tmp_path / "run").rglob("events.out.tfevents.*"))) == 1
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    events = log.Scalars("finetune/loss")
    assert [event.step for event in events] == [5, 6, 7, 8]
    losses = [
        r["loss"]
        for r in RunFolder(tmp_path / "run").metrics()
        if r["stage"] == "finetune" and "event" not in r
    ]
    assert [event.value for event in events] == pytest.approx(losses)

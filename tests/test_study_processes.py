"""Several processes over one study: those of a launch work independently, each row is one's own, each has its GPU."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from several import together
from study_tools import QUIET, half, make_world, settings_of, tiny_study

from grafting import processes, studies
from grafting.errors import CheckpointError, GraftError, RunError
from grafting.processes import own_device
from grafting.recipes.rows import Row
from grafting.recipes.table import plan_of, teacher_rows
from grafting.studies import row_run, run_rows, run_study
from grafting.studies.row_run import Setting
from grafting.studies.runner import _work
from grafting.studies.share import Launch, alone_in, link
from grafting.training.compute import make_compute

BROKEN = Row("broken", "broken", {"plan": plan_of("mha", "hyena_x", [99])})
ROWS = (
    *teacher_rows()[:2],
    Row("half", "half", half(), rank=1),
    Row("other", "other", half(loss="l2"), rank=1),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def as_user(folder: Path, given: list[str], rows: tuple[Row, ...], resume: bool) -> tuple[str, bool, str]:
    """`graft study tiny` in one process: the error it ends with, whether it is in a group, and its WORLD_SIZE."""
    studies.STUDIES["tiny"] = tiny_study(*rows)
    studies.NAMES = (*studies.STUDIES, studies.DONOR_INIT)
    try:
        run_study("tiny", folder, QUIET, changes=given, resume=resume)
        said = ""
    except RunError as error:
        said = str(error)
    return said, torch.distributed.is_initialized(), os.environ["WORLD_SIZE"]


def test_the_processes_of_a_launch_share_the_rows_and_mix_nothing(world: Path, tmp_path: Path) -> None:
    given = [text for text in settings_of(world) if not text.startswith("sample")]
    given += ["sample.num=6", "sample.steps=1", "sample.batch_size=2"]
    rows = (*ROWS, BROKEN)
    with pytest.raises(RunError, match="1 of 5 rows"):
        run_rows(tiny_study(*rows), tmp_path / "one", QUIET, changes=given)
    found = together(
        2, as_user, tmp_path / "two", given, rows, False
    )  # no --resume, whoever makes the folder
    assert all(isinstance(end, tuple) for end in found), found
    assert all(end[1:] == (False, "2") for end in found)
    said = [end[0] for end in found if end[0]]
    assert said  # by the last to end, or by both where they end together
    assert all("1 of 5 rows" in text for text in said), said
    for row in ROWS:
        one, two = (tmp_path / name / "rows" / row.name for name in ("one", "two"))
        assert (one / "samples/student.npz").read_bytes() == (two / "samples/student.npz").read_bytes()
        results = [json.loads((path / "result.json").read_text()) for path in (one, two)]
        assert results[0]["metrics"] == results[1]["metrics"]
    tables = [json.loads((tmp_path / name / "study.json").read_text()) for name in ("one", "two")]
    assert [row["distance"] for row in tables[0]["rows"]] == [row["distance"] for row in tables[1]["rows"]]
    assert (tmp_path / "two/study.html").is_file()
    later = together(2, as_user, tmp_path / "two", given, rows, False)
    assert all("already holds a study" in end[0] for end in later), later


def test_a_study_refuses_what_others_left_and_not_what_its_own_launch_made(tmp_path: Path) -> None:
    first, second = (Launch(rank, 2, rank, "a") for rank in (0, 1))
    assert first.may_begin(tmp_path)
    (tmp_path / "launches").mkdir()  # the other process is about to leave its note
    assert second.may_begin(tmp_path)
    first.begin(tmp_path)
    (tmp_path / "rows").mkdir()
    assert second.may_begin(tmp_path)
    assert not Launch(1, 2, 1, "b").may_begin(tmp_path)
    assert not Launch().may_begin(tmp_path)
    assert not first.may_begin(tmp_path)  # a launch under the same names, such as torchrun's default port
    file = tmp_path / "file"
    file.touch()
    assert not second.may_begin(file)


def test_a_process_that_ends_before_the_others_is_no_failure_yet(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun, and srun with --kill-on-bad-exit, end the others at the first bad status."""
    study = tiny_study(BROKEN, ROWS[0])
    monkeypatch.setattr(Launch, "here", lambda: Launch(0, 2, 0, "a"))
    held = tmp_path / "rows" / ROWS[0].name
    held.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    other = context.Process(target=hold, args=(held, theirs))
    other.start()
    assert ours.poll(60)
    page = run_rows(study, tmp_path, QUIET, changes=settings_of(world))
    assert page.is_file()
    assert (tmp_path / "failures/broken.json").is_file()
    ours.send("end")
    other.join()
    with pytest.raises(RunError, match=r"1 of 2 rows .*\(broken\)"):
        run_rows(study, tmp_path, QUIET, changes=settings_of(world))


def hold(folder: Path, end: Any) -> None:
    """Keep a folder's lock until told."""
    with alone_in(folder):
        end.send("held")
        end.recv()


def test_donor_init_is_not_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="one of 2 that were started together"):
        run_study("donor-init", tmp_path / "new", QUIET)
    assert not (tmp_path / "new").exists()


# ---- devices


def test_a_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [own_device("cuda", number) for number in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert [own_device(name, 3) for name in ("cuda:2", "cpu", "mps")] == ["cuda:2", "cpu", "mps"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device("cuda", 3) == "cuda"


@pytest.mark.parametrize(
    ("launch", "wanted"),
    [
        (Launch(), [("cuda:0", 1), ("cuda:1", 2), ("cuda:2", 3)]),
        (Launch(3, 4, 1, "a"), [("cuda:3", 10), ("cuda:4", 11), ("cuda:5", 12)]),
    ],
    ids=["alone", "launched"],
)
def test_jobs_are_spread_over_the_gpus(
    launch: Launch,
    wanted: list[tuple[str, int]],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[str, int]] = []

    def process(*, target: Any, name: str, args: tuple[Any, ...]) -> Any:
        setting, _, _, number = args
        started.append((setting.device, number))
        return SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=0)

    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SimpleNamespace(Process=process))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(Launch, "here", lambda: launch)
    run_rows(tiny_study(ROWS[0]), tmp_path, QUIET, changes=settings_of(world), device="cuda", jobs=3)
    assert started == wanted


def one_gpu(uuids: list[str], calls: int) -> Any:
    """The device of a process that sees one GPU, the one of that UUID."""
    rank = processes.join().rank
    torch.accelerator.is_available = lambda: True  # type: ignore[method-assign, assignment]
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.set_device_index = lambda number: None  # type: ignore[method-assign, assignment]
    torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid=uuids[rank])  # type: ignore
    try:
        return [str(make_compute(torch.device("cuda"), "fp32").device) for _ in range(calls)]
    except GraftError as error:
        return str(error)


def test_a_process_that_sees_one_gpu_takes_it_unless_another_has_it() -> None:
    assert together(2, one_gpu, ["GPU-a", "GPU-b"], 2) == [["cuda:0"] * 2] * 2
    refused = together(2, one_gpu, ["GPU-a", "GPU-a"], 1)
    assert all("processes 0, 1 of 2 see one GPU, and it is the same (GPU-a)" in said for said in refused)


# ---- the teacher's samples


def test_the_teacher_s_samples_are_asked_for_once_the_row_is_trained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can take a day, in which other rows train."""
    sample, done = row_run._sample, []

    def noting(*arguments: Any) -> None:
        done.append(set(json.loads((tmp_path / "rows/half/run.json").read_text())["stages"]))
        sample(*arguments)

    monkeypatch.setattr(row_run, "_sample", noting)
    given = [text for text in settings_of(world) if not text.startswith("evaluate")]
    run_rows(tiny_study(ROWS[2]), tmp_path, QUIET, changes=[*given, "evaluate.reference=teacher"])
    assert done == [{"graft", "distill", "finetune"}] * 2  # the teacher's and the reference, each once
    drawn = sorted((tmp_path / "shared/teacher").glob("*/samples.npz"))
    linked = [tmp_path / "rows/half/samples" / f"{name}.npz" for name in ("teacher", "reference")]
    assert sorted(path.stat().st_ino for path in drawn) == sorted(path.stat().st_ino for path in linked)


def test_a_disk_that_refuses_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for, and no row is left to it; a lock that is a link is refused like a file on a full disk."""
    study = tiny_study(*teacher_rows()[:1])
    for folder in (tmp_path / "shared", tmp_path / "rows" / study.rows[0].name):
        folder.mkdir(parents=True)
        (folder / "run.lock").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr("grafting.studies.share.time.sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(RunError, match=r"^can't write .*shared/run\.lock'"), alone_in(tmp_path / "shared"):
        pytest.fail("it got in")
    with pytest.raises(RunError, match=r"^can't write .*rows/.*/run\.lock'"):
        _work(Setting(study, tmp_path), list(study.rows), QUIET)


def test_a_copy_that_finds_no_room_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:  # as between two disks
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    source, target, old = (
        tmp_path / "a.npz",
        tmp_path / "b" / "a.npz",
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    source.write_bytes(bytes(range(256)) * 40)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"^can't write .*b/a\.npz': File too large$"):
            link(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(target.parent.iterdir()) == []
    link(source, target)
    assert target.read_bytes() == source.read_bytes()

"""Several processes give what one gives: batches are cut by sample, draws are functions of global numbers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from several import together

from grafting import GraftPlan, Replace, distill, finetune, graft, processes
from grafting.data import ImageLabelDataset
from grafting.errors import GraftError, Interrupted, PeerError, RunError
from grafting.generation import generate
from grafting.launch import launch, wanted
from grafting.processes import Place, first_host, place
from grafting.runs import RunFolder
from grafting.training.cache import ActivationCache
from grafting.training.compute import Compute, make_compute
from grafting.training.config import FinetuneConfig, settings
from grafting.training.loop import Quiet

PLAN = GraftPlan(
    [Replace("mha", [1, 3], "hyena_x"), Replace("mha", [2], "swa", {"window": 2}, init="random")]
)
COMMON = {"precision": "fp32", "num_validation": 7, "warmup": 2, "log_every": 1, "checkpoint_every": 50}
STAGE_1: dict[str, Any] = {**COMMON, "steps": 20, "batch_size": 10, "lr": 1e-3, "validate_every": 10}
STAGE_2: dict[str, Any] = {
    **STAGE_1, "lr": 5e-4, "validate_every": 10, "objectives": {"diffusion": 0.5, "output": 1.0, "features": 0.1},
}  # fmt: skip


def numbers(record: Any, path: str = "") -> dict[str, float]:
    """The figures in a record of the log, by their place."""
    if isinstance(record, dict):
        return {k: v for name, item in record.items() for k, v in numbers(item, f"{path}/{name}").items()}
    return {path: record} if isinstance(record, float) else {}


def both_stages(data: ImageLabelDataset, changes: dict[str, Any]) -> list[dict[str, float]]:
    """What both stages log."""
    teacher = tiny_dit()
    student, journal = graft(teacher, PLAN), Quiet()
    distill(student, teacher, data, {**STAGE_1, **changes.get("distill", {})}, journal=journal)
    finetune(student, data, {**STAGE_2, **changes.get("finetune", {})}, teacher, journal=journal)
    return [numbers(record) for record in journal.records]


@pytest.fixture(scope="module")
def alone(data: ImageLabelDataset) -> list[dict[str, float]]:
    return both_stages(data, {})


def assert_alike(
    found: list[dict[str, float]], wanted: list[dict[str, float]], tolerance: float = 1e-5
) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("world", [2, 4])
def test_losses_errors_and_norms_are_those_of_one_process(
    data: ImageLabelDataset, alone: list[dict[str, float]], world: int
) -> None:
    changes = {"finetune": {"shard": "full" if world == 4 else "none", "micro_batch": 2}}
    for records in together(
        world, both_stages, data, changes
    ):  # batches of 10: uneven shares for 4 processes
        assert_alike(records, alone)


def counts_held_out(data: ImageLabelDataset) -> list[int]:
    """How many samples this process passed through the teacher in each look at the held-out set."""
    from grafting.training import distillation

    seen: list[int] = []
    taps, errors = distillation._Stage.taps, distillation._Stage.errors

    def counting(stage: Any, batch: Any, paths: list[str]) -> Any:
        seen[-1] += len(batch.t)
        return taps(stage, batch, paths)

    def looking(stage: Any, modules: Any = None) -> dict[str, float]:
        seen.append(0)
        found = errors(stage, modules)
        seen.append(0)  # what follows is no look
        return found

    distillation._Stage.taps, distillation._Stage.errors = counting, looking  # type: ignore[method-assign]
    try:
        teacher = tiny_dit()
        seen.append(0)
        distill(graft(teacher, PLAN), teacher, data, {**STAGE_1, "steps": 1, "num_validation": 10})
    finally:
        distillation._Stage.taps, distillation._Stage.errors = taps, errors  # type: ignore[method-assign]
    return seen[1::2]


def test_a_held_out_set_of_one_batch_is_shared_out(data: ImageLabelDataset) -> None:
    one, (first, second) = counts_held_out(data), together(2, counts_held_out, data)
    assert (set(one), set(first), set(second)) == (
        {8},
        {5},
        {3},
    )  # eight is a tenth of the data; a share is five
    assert len(one) == len(first) == len(second)


def test_small_parts_add_up_to_the_batch(data: ImageLabelDataset, alone: list[dict[str, float]]) -> None:
    assert_alike(both_stages(data, {stage: {"micro_batch": 3} for stage in ("distill", "finetune")}), alone)


def test_parts_cover_the_batch_once_and_all_processes_have_as_many() -> None:
    for world, size, micro in [
        (1, 10, 0),
        (1, 10, 3),
        (4, 10, 1),
        (4, 10, 2),
        (3, 9, 2),
        (4, 5, 1),
        (4, 3, 0),
    ]:
        of = [
            Compute(torch.device("cpu"), "fp32", rank, world).parts(torch.arange(size), micro)
            for rank in range(world)
        ]
        assert len({len(parts) for parts in of}) == 1
        assert all(len(index) <= (micro or size) for parts in of for index, _ in parts)
        total = torch.zeros(size, dtype=torch.float64)
        for parts in of:
            for index, weight in parts:
                total[index] += weight / len(index)
        torch.testing.assert_close(total, torch.full((size,), 1 / size, dtype=torch.float64))


# ---- stopping and going on


class StopsAt(RunFolder):
    """A run folder whose process is asked to stop before one step."""

    def __init__(self, path: Path, step: int | None, *, writer: bool) -> None:
        super().__init__(path, writer=writer)
        path.mkdir(exist_ok=True)
        self.console.quiet = True
        self.asked, self.left = step is not None, step or 0

    def stop_requested(self) -> int | None:
        self.left -= 1
        return 143 if self.asked and self.left < 0 else None


def one_stage(folder: Path, data: ImageLabelDataset, changes: dict[str, Any], stop: int | None) -> Any:
    """Stage 2, asked to stop in the last process only; its losses and final weights, or where it stopped."""
    compute = make_compute(torch.device("cpu"))
    torch.manual_seed(0)
    student = graft(tiny_dit(), PLAN)
    last = compute.rank == compute.world - 1
    journal = StopsAt(folder, stop if last else None, writer=compute.is_main)
    try:
        finetune(student, data, {**STAGE_2, "objectives": {"diffusion": 1.0}, **changes}, journal=journal)
    except Interrupted as error:
        return error.code, str(error)
    return {name: value.detach().numpy() for name, value in student.named_parameters()}


def test_a_stop_reaches_all_and_a_run_of_two_goes_on_with_one_and_with_four(
    data: ImageLabelDataset, tmp_path: Path
) -> None:
    changes = {"log_every": 4, "steps": 12, "shard": "full", "preview_every": 6, "preview_samples": 2}
    whole = one_stage(tmp_path / "whole", data, changes, None)
    stopped = together(2, one_stage, tmp_path / "run", data, changes, 6)
    assert stopped == [(143, "stopped at step 6 on request; --resume goes on from there")] * 2
    assert [path.name for path in (tmp_path / "run/checkpoints/finetune").glob("*.pt")] == ["000000006.pt"]
    shutil.copytree(tmp_path / "run", tmp_path / "four")
    one = one_stage(tmp_path / "run", data, changes, None)
    four = together(4, one_stage, tmp_path / "four", data, changes, None)
    logs = [
        [numbers(record) for record in RunFolder(tmp_path / name).metrics()]
        for name in ("whole", "run", "four")
    ]
    assert_alike(logs[1], logs[0])
    assert_alike(logs[2], logs[0])
    for found in [one, *four]:
        for name, value in whole.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-4)
    assert all(np.array_equal(four[0][name], found[name]) for found in four for name in whole)


def dies(data: ImageLabelDataset) -> str:
    compute = make_compute(torch.device("cpu"))
    journal = Quiet()
    if compute.rank == 1:
        journal.stop_requested = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    try:
        finetune(
            graft(tiny_dit(), PLAN), data, {**STAGE_2, "objectives": {"diffusion": 1.0}}, journal=journal
        )
    except PeerError as error:
        return str(error)
    return "went on"


def test_the_others_end_when_one_dies(data: ImageLabelDataset) -> None:
    first, second = together(2, dies, data, timeout=60)
    assert second == "died"
    assert first.startswith("another process of this run has ended or can't be reached")


def waits_for_a_slow_one(patience: float, slow: float) -> str:
    """The first process waits while the second works longer than a message may take, or ends without coming."""
    processes.TIMEOUT = timedelta(seconds=patience)
    compute = make_compute(torch.device("cpu"))
    compute.wait()
    if compute.rank == 1 and slow < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(slow * compute.rank)
    try:
        compute.wait()
    except PeerError as error:
        return str(error)
    return "met"


def test_a_wait_outlasts_the_patience_of_messages() -> None:
    assert together(2, waits_for_a_slow_one, 1.0, 4.0) == ["met", "met"]


def test_stored_activations_are_waited_for_before_the_next_message(
    data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, collect, teacher = list[str](), ActivationCache.collect, tiny_dit()

    def collecting(stage: Any, paths: list[str]) -> ActivationCache:
        seen.append("stored")
        return collect(stage, paths)

    monkeypatch.setattr(ActivationCache, "collect", collecting)
    monkeypatch.setattr(Compute, "wait", lambda compute: seen.append("waited"))
    monkeypatch.setattr(Compute, "agree_to_stop", lambda compute, code: seen.append("asked"))
    changes = {"steps": 1, "mode": "cached", "cache_samples": 10}
    distill(graft(teacher, PLAN), teacher, data, {**STAGE_1, **changes})
    assert seen[-4:-1] == ["stored", "waited", "asked"]


def test_a_loss_that_is_measured_is_the_first_process_s(
    data: ImageLabelDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device may round the figure that it is chosen by to the other side of a threshold."""
    teacher, plan = tiny_dit(), GraftPlan([Replace("mha", [1, 3], "hyena_x", loss="auto")])

    def from_main(compute: Compute, value: Any) -> Any:
        return ["huber", "huber"] if isinstance(value, list) else value

    monkeypatch.setattr(Compute, "from_main", from_main)
    result = distill(graft(teacher, plan), teacher, data, {**STAGE_1, "steps": 1})
    assert set(result.losses.values()) == {"huber"}


def test_nobody_waits_for_one_that_is_gone() -> None:
    first, second = together(2, waits_for_a_slow_one, 60.0, -1.0, timeout=60)
    assert second == "died"
    assert first.startswith("another process of this run has ended")


# ---- samples


def draw(path: Path) -> None:
    generate(tiny_dit(), path, num=10, steps=2, batch_size=4)


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    draw(tmp_path / "one.npz")
    assert together(2, draw, tmp_path / "two.npz") == [None, None]
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


# ---- who and where


def test_the_place_of_a_process() -> None:
    assert place({}) == Place(0, 1, 0)
    assert place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(5, 8, 1)
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77"}
    assert place(slurm) == Place(0, 1, 0)  # a batch script is not one of its tasks
    assert place({**slurm, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "a[1-2]"}) == Place(3, 4, 1)
    assert place({**slurm, "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "2", "RANK": "1"}) == Place(1, 2, 1)
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}):
        with pytest.raises(GraftError, match="RANK"):
            place(wrong)
    names = [first_host(nodes) for nodes in ("gpu[03-05,9],cpu1", "node7", "a1,a2", "r[2]-ib")]
    assert names == ["gpu03", "node7", "a1", "r2-ib"]


def test_muon_is_not_sharded() -> None:
    with pytest.raises(RunError, match="whole matrices"):
        settings(FinetuneConfig, {"shard": "full", "optimizer": "muon"}, "finetune")


def test_processes_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted(2)
    assert not wanted(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not wanted(2)
    with pytest.raises(RunError, match="--processes 4"):
        wanted(4)


@pytest.mark.parametrize(
    ("script", "status", "line"),
    [
        ("raise SystemExit(0)", 0, ""),
        ("raise SystemExit(3 if rank else 137)", 3, ""),
        (
            "os.kill(os.getpid(), 9) if rank else time.sleep(60)",
            137,
            "error: process 1 of 2 was ended by SIGKILL",
        ),
        ("raise SystemExit(137)", 137, "error: the processes of this run lost each other"),
        ("os.kill(os.getppid(), 15); time.sleep(60)", 143, "error: terminated"),
    ],
    ids=["well", "worker", "killed", "lost", "stopped"],
)
def test_the_launcher_ends_as_its_worker(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], script: str, status: int, line: str
) -> None:
    monkeypatch.setattr("grafting.launch.GRACE", 0.2)
    if "getppid" in script:
        script = f"if rank == 0: {script}\nelse: time.sleep(60)"
    code = launch([], 2, ("-c", f"import os, time\nrank = int(os.environ['RANK'])\n{script}"))
    assert code == status
    stderr = capfd.readouterr().err
    assert stderr.startswith(line)
    assert stderr.count("\n") == (1 if line else 0)


def test_a_signal_reaches_a_worker_that_is_just_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each: a second one would ask for an end at once."""
    begin, told = subprocess.Popen, list[tuple[int, int]]()

    class Worker(begin):  # type: ignore[type-arg,misc,valid-type]
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            self.rank = int(options["env"]["RANK"])
            if self.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number: int) -> None:
            told.append((self.rank, number))
            super().send_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Worker)
    assert launch([], 3, ("-c", "import time; time.sleep(60)")) == 143
    assert sorted(told) == [(0, 15), (1, 15), (2, 15)]


def test_what_is_done_alone_sees_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    several = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "1",
    }
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with processes.alone() as where:
        assert where == Place(1, 4, 1)
        assert place() == Place()
        assert make_compute(torch.device("cpu")).world == 1
    assert dict(os.environ) == before

"""Both stages on a tiny DiT: stop and resume to the same bits, and input that is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prediction, tiny_dit
from stage_tools import RANDOM, STAGE_1, STAGE_2, states_equal
from torch import Tensor, nn

from grafting import GraftPlan, Replace, distill, finetune, graft
from grafting.data import ImageLabelDataset
from grafting.errors import DataError, DivergedError, GraftError, Interrupted, PlanError, RunError
from grafting.runs import RunFolder


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_dit()


# ---- stop and resume


class Stopping(RunFolder):
    """A run folder that asks its stage to stop before step `at`."""

    at: int | None = None
    asked = 0

    def stop_requested(self) -> int | None:
        self.asked += 1
        return 143 if self.asked == self.at else None


def run_stage(
    stage: str, teacher: nn.Module, data: ImageLabelDataset, folder: RunFolder, **changes: Any
) -> nn.Module:
    plan = GraftPlan(
        [Replace("mha", [1, 3], "hyena_x"), Replace("mlp", [0], "mlp", {"ratio": 2}, init="random")]
    )
    student = graft(teacher, plan)
    if stage == "distill":
        distill(student, teacher, data, {**STAGE_1, "early_stop": 1, **changes}, journal=folder)
    else:
        finetune(student, data, {**STAGE_2, **changes}, teacher=teacher, journal=folder)
    return student


Uncut = Callable[[str], tuple[RunFolder, nn.Module]]


@pytest.fixture(scope="module")
def uncut(teacher: nn.Module, data: ImageLabelDataset, tmp_path_factory: pytest.TempPathFactory) -> Uncut:
    """A function that gives the folder of a stage that was not stopped, to read, and its student."""

    @cache
    def of(stage: str) -> tuple[RunFolder, nn.Module]:
        folder = RunFolder(tmp_path_factory.mktemp(stage))
        return folder, run_stage(stage, teacher, data, folder, keep_checkpoints=9)

    return of


@pytest.mark.parametrize("stage", ["distill", "finetune"])
@pytest.mark.parametrize("at", [1, 2, 9, 14, 24])
def test_a_stopped_stage_goes_on_to_the_same_bits(
    teacher: nn.Module, data: ImageLabelDataset, uncut: Uncut, tmp_path: Path, stage: str, at: int
) -> None:
    whole, wanted = uncut(stage)
    folder = Stopping(tmp_path / "cut")
    folder.path.mkdir()
    folder.at = at
    with pytest.raises(Interrupted) as stop:
        run_stage(stage, teacher, data, folder)
    assert (stop.value.code, f"step {at - 1}" in str(stop.value)) == (143, True)
    resumed = RunFolder(tmp_path / "cut")
    found = run_stage(stage, teacher, data, resumed)
    assert states_equal(found, wanted)
    assert resumed.metrics() == whole.metrics()


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_killed_stage_goes_on_from_its_last_checkpoint(
    teacher: nn.Module, data: ImageLabelDataset, uncut: Uncut, tmp_path: Path, stage: str
) -> None:
    """As after SIGKILL: checkpoints of steps 8 and 16 and metrics up to 21; then with the newest damaged."""
    whole, wanted = uncut(stage)
    for damage in (None, "cut", "flip", "no manifest", "both"):
        folder = RunFolder(tmp_path / f"killed {damage}")
        checkpoints = folder.path / "checkpoints" / stage
        checkpoints.mkdir(parents=True)
        source = whole.path / "checkpoints" / stage
        for file in sorted(source.iterdir()):
            if int(file.stem) <= 16:
                (checkpoints / file.name).write_bytes(file.read_bytes())
        assert len(list(checkpoints.iterdir())) == 4
        newest = checkpoints / "000000016.pt"
        content = bytearray(newest.read_bytes())
        if damage == "cut":
            newest.write_bytes(content[:-1000])
        elif damage == "flip":
            content[len(content) // 2] ^= 1
            newest.write_bytes(content)
        elif damage == "no manifest":
            newest.with_suffix(".json").unlink()
        elif damage == "both":
            newest.write_bytes(b"")
            (checkpoints / "000000008.pt").write_bytes(b"")
        lines = (whole.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        early = [line for line in lines if int(line.split('"step": ')[1].split(",")[0]) <= 21]
        (folder.path / "metrics.jsonl").write_text("".join(early) + early[-1][:7])  # a torn last line
        found = run_stage(stage, teacher, data, folder)
        assert states_equal(found, wanted), damage
        assert folder.metrics() == whole.metrics(), damage


class Poisoned:
    """Data that turns to NaN from the given call on."""

    def __init__(self, data: ImageLabelDataset, calls: int) -> None:
        self.data, self.calls = data, calls
        self.name, self.shape, self.num_classes = data.name, data.shape, data.num_classes
        self.content_hash = data.content_hash

    def __len__(self) -> int:
        return len(self.data)

    def split(self, num_validation: int, seed: int = 0) -> tuple[Any, Any]:
        train, validation = self.data.split(num_validation, seed)
        return Poisoned(train, self.calls), validation

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        self.calls -= 1
        x, y = self.data.batch(indices)
        return (x * float("nan") if self.calls < 0 else x), y


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path, stage: str
) -> None:
    folder = RunFolder(tmp_path)
    calls = 13 + (stage == "distill")  # stage 1 reads one batch more, to fit the readouts
    with pytest.raises(DivergedError, match=r"diverged.*lower lr") as caught:
        run_stage(stage, teacher, Poisoned(data, calls), folder, early_stop=0, fit_samples=16) if (
            stage == "distill"
        ) else run_stage(stage, teacher, Poisoned(data, calls), folder)
    assert caught.value.exit_code == 3
    kept = sorted((tmp_path / "checkpoints" / stage).glob("*.pt"))
    assert [file.stem for file in kept] == ["000000008"]
    state = folder.load_checkpoint(stage)
    tensors = state["parameters"] if stage == "finetune" else state["pupils"]["blocks.1.attn"]["state"]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    # and with good data it goes on
    found = run_stage(stage, teacher, data, folder)
    assert prediction(found).isfinite().all()


def test_a_learning_rate_that_is_far_too_large_is_told_as_such(
    teacher: nn.Module, data: ImageLabelDataset, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(DivergedError, match="lr"):
        run_stage("finetune", teacher, data, folder, lr=1e30, warmup=0, max_bad_steps=2)
    with pytest.raises(DivergedError, match="lr"):
        run_stage("distill", teacher, data, folder, lr=1e30, warmup=0, early_stop=0)


# ---- bad input


def test_data_that_does_not_fit_is_refused(teacher: nn.Module) -> None:
    def of(shape: tuple[int, ...], classes: int = 4) -> ImageLabelDataset:
        return ImageLabelDataset(torch.zeros(12, *shape), torch.arange(12) % 4, num_classes=classes)

    student = graft(teacher, RANDOM)
    before = copy.deepcopy(student.state_dict())
    for bad in (of((3, 8, 8)), of((1, 16, 16)), of((1, 8, 8), classes=5)):
        with pytest.raises(DataError, match="model"):
            distill(student, teacher, bad, STAGE_1)
        with pytest.raises(DataError, match="model"):
            finetune(student, bad, STAGE_1)
    with pytest.raises(DataError, match="not finite"):
        ImageLabelDataset(torch.full((2, 1, 8, 8), float("nan")), torch.tensor([0, 1]))
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_a_student_without_a_plan_or_of_another_shape_is_refused(
    teacher: nn.Module, data: ImageLabelDataset
) -> None:
    with pytest.raises(PlanError, match="no replaced operators"):
        distill(tiny_dit(), teacher, data, STAGE_1)
    with pytest.raises(PlanError, match="no replaced operators"):
        finetune(tiny_dit(), data, {**STAGE_1, "train": "operators"})
    with pytest.raises(RunError, match="teacher="):
        finetune(graft(teacher, RANDOM), data, {**STAGE_1, "objectives": {"output": 1.0}})
    student = graft(teacher, RANDOM)
    with pytest.raises(PlanError, match="teacher is the student"):
        distill(student, student, data, STAGE_1)
    for other in (
        tiny_dit(hidden_size=64),
        tiny_dit(depth=2),
        tiny_dit(in_channels=2),
        tiny_dit(patch_size=4),
    ):
        with pytest.raises(GraftError, match="teacher"):
            distill(student, other, data, STAGE_1)
        with pytest.raises(GraftError, match="teacher"):
            finetune(student, data, {**STAGE_1, "objectives": {"features": 1.0}}, teacher=other)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"stesp": 3}, "steps"), ({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"lr": float("nan")}, "lr"),
        ({"batch_size": 2.5}, "batch_size"), ({"clip": 0}, "clip"), ({"label_dropout": 1.0}, "label_dropout"),
        ({"precision": "fp8"}, "precision"), ({"seed": -1}, "seed"), (3, "mapping"), ({"betas": [0.9]}, "betas"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(
    teacher: nn.Module, data: ImageLabelDataset, config: Any, word: str
) -> None:
    student = graft(teacher, RANDOM)
    for act in (lambda: distill(student, teacher, data, config), lambda: finetune(student, data, config)):
        with pytest.raises(RunError, match=word) as caught:
            act()
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="objectives"):
        finetune(student, data, {"objectives": {"diffusion": 0.0}})
    with pytest.raises(RunError, match="objectives"):
        finetune(student, data, {"objectives": {"difusion": 1.0}})

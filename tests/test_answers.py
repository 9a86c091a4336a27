"""What the teacher predicts in stage 2 is asked once for all students that are finetuned alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_dit
from stage_tools import CHECK
from torch import Tensor, nn

from grafting import Replace, finetune, graft
from grafting.data import ImageLabelDataset
from grafting.errors import CheckpointError
from grafting.families import family_of
from grafting.training import answers
from grafting.training.answers import Answers
from grafting.training.compute import Compute
from grafting.training.config import FinetuneConfig, settings

OUTPUT: dict[str, Any] = {**CHECK, "steps": 3, "objectives": {"output": 1.0, "diffusion": 0.5}, "lr": 1e-3}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_dit()


class Asked:
    """Counts the predictions that a teacher is asked for, by its first weight."""

    def __init__(self, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        kind = type(family_of(teacher))
        plain = kind.predict

        def predict(family: Any, model: nn.Module, *given: Any) -> Tensor:
            self.times += model is teacher
            return plain(family, model, *given)

        monkeypatch.setattr(kind, "predict", predict)


def trained(data: ImageLabelDataset, teacher: nn.Module, seed: int = 2, **how: Any) -> dict[str, Tensor]:
    student = tiny_dit(seed=seed)
    finetune(student, data, {**OUTPUT, **how.pop("config", {})}, teacher, **how)
    return student.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("micro_batch", [0, 5])
def test_students_end_at_the_same_bits_and_the_teacher_is_asked_once(
    data: ImageLabelDataset, teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:  # fmt: skip
    config = {"micro_batch": micro_batch}
    alone = [trained(data, teacher, seed, config=config) for seed in (2, 3)]
    asked = Asked(teacher, monkeypatch)
    found = [trained(data, teacher, seed, config=config, answers=tmp_path) for seed in (2, 3)]
    passes = 3 * (1 if micro_batch == 0 else 4)
    assert asked.times == passes
    assert all(same(a, b) for a, b in zip(alone, found, strict=True))
    assert len(list(tmp_path.glob("*/*.safetensors"))) == passes
    # a damaged answer is asked for again, and mended
    file = sorted(tmp_path.glob("*/*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert same(trained(data, teacher, 3, config=config, answers=tmp_path), alone[1])
    assert asked.times == passes + 1
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"batch_size": 8}, {"label_dropout": 0.5}, {"num_validation": 4}, {"timesteps": "spread"},
     {"fraction": 0.5}, {"precision": "bf16"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_other_questions_are_asked_anew(
    data: ImageLabelDataset, teacher: nn.Module, tmp_path: Path, change: dict[str, Any]
) -> None:
    trained(data, teacher, answers=tmp_path)
    trained(
        data, teacher, answers=tmp_path, config={"lr": 1e-4, "optimizer": "muon", "clip": 1.0, "steps": 2}
    )
    assert len(list(tmp_path.iterdir())) == 1  # how a student learns is no part of the question
    trained(data, teacher, answers=tmp_path, config=change)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_teacher_and_other_data_are_asked_anew(
    data: ImageLabelDataset, teacher: nn.Module, tmp_path: Path
) -> None:
    trained(data, teacher, answers=tmp_path)
    trained(data, tiny_dit(seed=5), answers=tmp_path)
    other = copy.deepcopy(data).subset(0.9, 0)
    trained(other, teacher, answers=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_teachers_that_differ_in_an_operator_s_settings_alone_are_two(
    data: ImageLabelDataset, teacher: nn.Module, tmp_path: Path
) -> None:
    """Same weights, another window."""
    edited = [graft(teacher, [Replace("mha", "all", "swa", config={"window": w})]) for w in (1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(edited[0].parameters(), edited[1].parameters(), strict=True))
    for model in edited:
        trained(data, model, answers=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("objectives", [{"diffusion": 1.0}, {"output": 1.0, "features": 0.1}])
def test_nothing_is_kept_where_predictions_are_not_what_is_asked(
    data: ImageLabelDataset, teacher: nn.Module, tmp_path: Path, objectives: dict[str, float]
) -> None:
    config = {"objectives": objectives}
    assert same(
        trained(data, teacher, config=config), trained(data, teacher, config=config, answers=tmp_path)
    )
    assert not list(tmp_path.iterdir())


def test_several_processes_ask_for_themselves(
    data: ImageLabelDataset, teacher: nn.Module, tmp_path: Path
) -> None:
    config = settings(FinetuneConfig, OUTPUT, "finetune")
    one = Compute(torch.device("cpu"), "fp32")
    assert answers.answers_of(tmp_path, teacher, data, config, one) is not None
    assert answers.answers_of(tmp_path, teacher, data, config, replace(one, world=2)) is None


@pytest.mark.parametrize("limit", ["MOST_BYTES", "SHARE"])
def test_what_would_take_too_much_of_the_disk_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    index, answer = torch.arange(4), torch.randn(4, 2, 8, 8)
    monkeypatch.setattr(answers, limit, 0 if limit == "SHARE" else answer.nbytes * 3 - 1)
    assert torch.equal(Answers(tmp_path, {}, visits=12).at(index, lambda: answer), answer)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    Answers(tmp_path, {}, visits=12).at(index, lambda: answer)
    kept = Answers(tmp_path, {}, visits=12).at(index, lambda: pytest.fail("it was answered"))
    assert torch.equal(kept, answer)


def test_the_limit_is_for_all_answers_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, answer = torch.arange(4), torch.randn(4, 2, 8, 8)
    Answers(tmp_path, {"seed": 0}, visits=4).at(index, lambda: answer)
    held = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    for limit, count in ((held + answer.nbytes - 1, 1), (held + answer.nbytes, 2)):
        monkeypatch.setattr(answers, "MOST_BYTES", limit)
        Answers(tmp_path, {"seed": 1}, visits=4).at(index, lambda: answer)
        assert len(list(tmp_path.glob("*/*"))) == count


def test_a_disk_that_others_fill_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = torch.randn(4, 2, 8, 8)
    kept = Answers(tmp_path, {}, visits=8)
    for start, free, count in (
        (0, 10 * answer.nbytes, 1),
        (4, 2 * answer.nbytes - 1, 1),
        (4, 2 * answer.nbytes, 2),
    ):
        monkeypatch.setattr(Answers, "_free", lambda self, free=free: free)
        kept.at(torch.arange(start, start + 4), lambda: answer)
        assert len(list(tmp_path.glob("*/*"))) == count


@pytest.mark.parametrize(
    "error",
    [CheckpointError("can't write: No space left on device"), FileNotFoundError("cleared away")],
    ids=repr,
)
def test_a_disk_that_fails_stops_the_keeping_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(answers.weights, "write_safetensors", full)
    kept = Answers(tmp_path, {}, visits=8)
    assert torch.equal(kept.at(torch.arange(4), lambda: torch.ones(4, 1)), torch.ones(4, 1))
    monkeypatch.setattr(
        answers.weights, "write_safetensors", lambda *given, **named: pytest.fail("tried again")
    )
    kept.at(torch.arange(4, 8), lambda: torch.ones(4, 1))

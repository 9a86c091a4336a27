"""Arguments in every form that a caller has them in: data, plans, types, seeds, bases, wrapped and unknown models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pixart_tools import captions, latents, tiny_transformer
from stage_tools import states_equal
from tiny_runs import STAGE, tiny_recipe
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grafting import GraftPlan, Replace, distill, finetune, graft, load_graft, load_model, save_graft
from grafting.data import ImageLabelDataset, as_data, load_dataset
from grafting.diffusion import add_noise, loss_from_output, sample, training_losses
from grafting.errors import CheckpointError, DataError, GraftError, PlanError
from grafting.families import family_of
from grafting.recipes import load_recipe

PLAN: list[dict[str, Any]] = [{"replace": {"target": "mha", "layers": [1], "with": "hyena_x"}}]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_recipe(tmp_path)
    return tmp_path


def teacher_of(place: Path) -> nn.Module:
    return load_model(place / "model")


FORMS: dict[str, Callable[[Path, torch.Tensor, torch.Tensor], Any]] = {
    "path": lambda place, x, y: place / "data.npz",
    "text": lambda place, x, y: str(place / "data.npz"),
    "data source": lambda place, x, y: load_dataset(place / "data.npz"),
    "pair": lambda place, x, y: (x, y),
    "arrays": lambda place, x, y: [x.numpy(), y.numpy()],
    "mapping": lambda place, x, y: {"x": x, "y": y},
    "tensor dataset": lambda place, x, y: TensorDataset(x, y),
    "pairs": lambda place, x, y: [(image, int(label)) for image, label in zip(x, y, strict=True)],
    "loader": lambda place, x, y: DataLoader(TensorDataset(x, y), batch_size=4),
    "items by name": lambda place, x, y: [
        {"x": image, "y": label} for image, label in zip(x, y, strict=True)
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_data_comes_in_any_form(place: Path, form: str) -> None:
    whole = load_dataset(place / "data.npz")
    x, y = whole.batch(torch.arange(len(whole)))
    found = as_data(FORMS[form](place, x, y))
    again, labels = found.batch(torch.arange(len(found)))
    assert torch.equal(again, x)
    assert torch.equal(labels, y)
    assert found.content_hash == whole.content_hash


@pytest.mark.parametrize("data", [3, torch.zeros(4, 1, 8, 8), {"images": 1}, [1, 2, 3], iter([])])
def test_what_is_no_data_is_said_to_be_none(data: Any) -> None:
    with pytest.raises(DataError, match=r"expected a packaged name|item 0 of list can't be read as a pair"):
        as_data(data)


def test_both_stages_take_data_in_other_forms(place: Path) -> None:
    teacher, students = teacher_of(place), []
    for data in (place / "data.npz", load_dataset(place / "data.npz")):
        students.append(graft(teacher, PLAN))
        distill(students[-1], teacher, data, {**STAGE, "fit_samples": 8})
        finetune(students[-1], data, STAGE)
    assert states_equal(*students)


def test_a_plan_comes_in_any_form(place: Path) -> None:
    teacher, plan = teacher_of(place), GraftPlan(PLAN)
    plan.save(place / "plan.yaml")
    one = graft(teacher, plan)
    for form in (PLAN, plan.to_dict(), place / "plan.yaml", str(place / "plan.yaml"), iter(PLAN)):
        assert states_equal(graft(teacher, form), one)
    assert GraftPlan(entry for entry in plan) == plan
    assert Replace("mha", np.array([1, 3]), "hyena_x", config=None) == Replace("mha", [1, 3], "hyena_x")


def test_a_recipe_takes_the_content_of_a_plan_file_or_its_path(place: Path) -> None:
    recipe, plan = tiny_recipe(place), GraftPlan(PLAN)
    plan.save(place / "plan.yaml")
    for form in (plan.to_dict(), str(place / "plan.yaml")):
        assert load_recipe({**recipe, "plan": form}).graft_plan == plan
    with pytest.raises(GraftError, match="plan"):
        load_recipe({**recipe, "plan": {"version": 99, "entries": PLAN}})


def test_types_of_weights_go_by_name(place: Path) -> None:
    student = graft(teacher_of(place), PLAN)
    save_graft(student, place / "graft")
    for load in (load_model, load_graft):
        source = place / "graft"
        assert next(load(source, dtype="bfloat16").parameters()).dtype == torch.bfloat16
        for wrong in ("int32", torch.int32, "nonsense"):
            with pytest.raises(GraftError, match="expected one of float32"):
                load(source, dtype=wrong)


def test_models_are_loaded_for_evaluation(place: Path) -> None:
    save_graft(graft(teacher_of(place), PLAN), place / "graft")
    for model in (
        teacher_of(place),
        load_model(place / "graft"),
        load_graft(place / "graft"),
        load_model("dit-fashion"),
    ):
        assert not any(module.training for module in model.modules())


def test_a_seed_is_a_whole_number(place: Path) -> None:
    teacher = teacher_of(place)
    student = graft(teacher, PLAN, seed=np.int64(3))
    save_graft(student, place / "graft")
    assert states_equal(student, graft(teacher, PLAN, seed=3))
    for wrong in (-1, "a", 1.5, True):
        with pytest.raises(PlanError, match="seed"):
            graft(teacher, PLAN, seed=wrong)  # type: ignore[arg-type]


def test_a_base_is_a_model_or_where_it_lies(place: Path) -> None:
    teacher = teacher_of(place)
    student = graft(teacher, PLAN)
    save_graft(student, place / "graft")
    for base in (teacher, place / "model", str(place / "model")):
        assert states_equal(load_graft(place / "graft", base=base), student)
    with pytest.raises(CheckpointError, match="base: got"):
        load_graft(place / "graft", base=teacher.state_dict())  # type: ignore[arg-type]


def test_a_compiled_student_is_saved_as_what_it_is(place: Path) -> None:
    student = graft(teacher_of(place), PLAN)
    compiled = torch.compile(student, backend="eager")
    save_graft(compiled, place / "graft")
    assert states_equal(load_graft(place / "graft"), student)


def test_a_frozen_student_is_named(place: Path) -> None:
    teacher, data = teacher_of(place), place / "data.npz"
    student = graft(teacher, PLAN).requires_grad_(False)
    with pytest.raises(PlanError, match="frozen"):
        distill(student, teacher, data, STAGE)
    with pytest.raises(PlanError, match="frozen"):
        finetune(student, data, STAGE)
    distill(
        graft(teacher.requires_grad_(False), PLAN), teacher, data, {**STAGE, "fit_samples": 8}
    )  # the teacher may be


class Toy(nn.Module):
    """Predicts a tenth of what it sees, and the same for the variance."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.1 * x, 0.1 * x], dim=1)


def test_models_of_no_family_are_sampled_and_scored() -> None:
    x0, noise, t, y = (
        torch.zeros(2, 1, 4, 4),
        torch.ones(2, 1, 4, 4),
        torch.tensor([10, 500]),
        torch.tensor([0, 1]),
    )
    found = training_losses(Toy(), x0, t, y, noise)
    wanted = loss_from_output(Toy()(add_noise(x0, t, noise), t, y), x0, t, noise)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sample(Toy(), noise, y, steps=2).shape == noise.shape
    with pytest.raises(GraftError, match="no family knows"):
        sample(Toy(), noise, y, steps=2, guidance=1.5)


def test_text_to_image_models_are_scored() -> None:
    model, caption, x0 = tiny_transformer(), captions(2), latents(2)
    family, t, noise = family_of(model), torch.tensor([10, 500]), torch.ones_like(x0)
    with torch.no_grad():
        found = training_losses(model, x0, t, caption, noise)
        output = family.predict(model, add_noise(x0, t, noise), t, caption)
    assert torch.equal(found["loss"], loss_from_output(output, x0, t, noise)["loss"])


def test_data_of_one_class_only_keeps_its_labels() -> None:
    found = as_data((torch.zeros(3, 1, 4, 4), torch.tensor([2, 2, 2])))
    assert isinstance(found, ImageLabelDataset)
    assert found.num_classes == 3

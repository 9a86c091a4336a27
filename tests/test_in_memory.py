"""From Python alone, on models that are in memory: wrappers, hands on the student, modes, and data of one's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from pixart_tools import captions, latents, tiny_pipeline
from torch import Tensor, nn

import grafting
from grafting.data import ImageLabelDataset, as_data
from grafting.errors import CheckpointError, DataError, GraftError, PlanError, RunError
from grafting.surgery import record_of

PLAN: list[dict[str, Any]] = [{"replace": {"target": "mha", "layers": [1, 3], "with": "hyena_x"}}]
STAGE: dict[str, Any] = {"steps": 1, "batch_size": 4, "num_validation": 4, "precision": "fp32", "warmup": 0}


# ---- what is saved is what loads


def test_a_module_exchanged_by_hand_is_not_saved_as_what_the_plan_says(tmp_path: Path) -> None:
    base = tiny_dit()
    student = grafting.graft(base, PLAN)
    student.set_submodule("blocks.1.attn", copy.deepcopy(base.get_submodule("blocks.1.attn")))
    with pytest.raises(CheckpointError, match=r"plan of this model makes another one.*blocks\.1\.attn"):
        grafting.save_graft(student, tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


def test_adapters_of_peft_are_refused_until_they_are_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_dit()
    wrapped = peft.get_peft_model(grafting.graft(base, PLAN), peft.LoraConfig(target_modules=["qkv"], r=2))
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        grafting.save_graft(wrapped.base_model.model, tmp_path / "graft")
    with pytest.raises(GraftError, match=r"its \.base_model\.model"):
        grafting.finetune(wrapped, None)
    merged = wrapped.merge_and_unload()
    grafting.save_graft(merged, tmp_path / "graft")
    again = grafting.load_graft(tmp_path / "graft", base=base)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), merged.parameters(), strict=True))


def test_a_graft_of_a_compiled_model_can_be_saved(tmp_path: Path) -> None:
    base = tiny_dit()
    student = grafting.graft(torch.compile(base, backend="eager"), PLAN)  # type: ignore[arg-type]
    assert type(student) is type(base)
    assert record_of(torch.compile(student, backend="eager")) is record_of(student)  # type: ignore[arg-type]
    grafting.save_graft(student, tmp_path / "graft")
    again = grafting.load_graft(tmp_path / "graft", base=base)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))


def test_a_graft_of_a_model_in_memory_says_how_to_load_it(tmp_path: Path) -> None:
    grafting.save_graft(grafting.graft(tiny_dit(), PLAN), tmp_path / "graft")
    with pytest.raises(CheckpointError, match=r"grafting\.load_graft\(folder, base=model\)"):
        grafting.load_model(tmp_path / "graft")


# ---- diffusers


def test_an_edited_transformer_goes_back_into_its_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(GraftError, match=r"PixArtSigmaPipeline.*its \.transformer"):
        grafting.graft(pipeline, PLAN)
    pipeline.transformer = grafting.graft(pipeline.transformer, PLAN)

    def image(of: Any) -> Any:
        return of(
            "a red cat", num_inference_steps=1, height=16, width=16, output_type="np", use_resolution_binning=False,
            clean_caption=False, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    with pytest.raises(CheckpointError, match="not the pipeline around it"):
        grafting.save_pipeline(pipeline, tmp_path / "edited")
    with pytest.raises(CheckpointError, match=r"which pipeline it is of.*pipeline="):
        grafting.save_pipeline(pipeline.transformer, tmp_path / "edited")
    grafting.save_pipeline(pipeline.transformer, tmp_path / "edited", pipeline=tmp_path / "base")
    again = grafting.load_pipeline(tmp_path / "edited")
    again.set_progress_bar_config(disable=True)
    assert (image(again) == image(pipeline)).all()


def test_what_no_family_knows_is_told_what_to_do() -> None:
    from diffusers import DiTTransformer2DModel

    shape: dict[str, Any] = {
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "num_layers": 1,
        "sample_size": 4,
    }
    with pytest.raises(GraftError, match=r"save_pretrained.*load_model"):
        grafting.graft(DiTTransformer2DModel(in_channels=4, num_embeds_ada_norm=2, **shape), PLAN)
    with pytest.raises(GraftError, match="load it first"):
        grafting.graft("dit-fashion", PLAN)  # type: ignore[arg-type]
    with pytest.raises(GraftError, match=r"its \.module"):
        grafting.graft(nn.DataParallel(tiny_dit()), PLAN)
    with pytest.raises(GraftError, match="register_family"):
        grafting.graft(nn.Linear(2, 2), PLAN)


# ---- modes, types, places


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_stages_train_whatever_the_mode_around_them(mode: Any, data: ImageLabelDataset) -> None:
    base, students = tiny_dit(), []
    for context in (mode, torch.enable_grad):
        with context():
            students.append(grafting.graft(base, PLAN))
            grafting.distill(students[-1], base, data, {**STAGE, "fit_samples": 8})
            grafting.finetune(students[-1], data, STAGE)
    assert not any(p.is_inference() for p in students[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(*(s.parameters() for s in students), strict=True))


def test_a_student_of_another_type_than_the_teacher_is_refused(data: ImageLabelDataset) -> None:
    base = tiny_dit()
    with pytest.raises(DataError, match=r"bfloat16.*float32.*student\.to\(torch\.float32\)"):
        grafting.distill(grafting.graft(base, PLAN).bfloat16(), base, data, STAGE)


def test_arguments_that_changed_places_are_named(data: ImageLabelDataset) -> None:
    base = tiny_dit()
    student = grafting.graft(base, PLAN)
    with pytest.raises(PlanError, match=r"distill\(student, teacher, data\)"):
        grafting.distill(base, student, data, STAGE)
    with pytest.raises(RunError, match=r"finetune\(student, data, config, teacher=\.\.\.\)"):
        grafting.finetune(student, base, data)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the teacher is on the meta device"):
        grafting.distill(student, copy.deepcopy(base).to("meta"), data, STAGE)


# ---- data


class Failing(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Its fourth item can't be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 3:
            raise OSError("the disk is gone")
        return torch.zeros(1, 8, 8), 0


def test_an_item_that_can_not_be_read_is_named_with_its_reason() -> None:
    with pytest.raises(DataError, match=r"item 3 of Failing.*OSError: the disk is gone"):
        as_data(Failing())
    with pytest.raises(DataError, match=r"item 0 of list.*KeyError: 'x'"):
        as_data([{"pixel_values": torch.zeros(1, 8, 8), "label": 0}])
    with pytest.raises(DataError, match=r"item 1 of list has shape \[1, 4, 4\], item 0 \[1, 8, 8\]"):
        as_data([(torch.zeros(1, 8, 8), 0), (torch.zeros(1, 4, 4), 0)])
    with pytest.raises(DataError, match="labels must be 0"):
        as_data([(torch.zeros(1, 8, 8), -1)])
    for label in (0.0, 1.5, torch.tensor(1.0), True, torch.tensor([1, 2])):  # as in a TensorDataset
        with pytest.raises(DataError, match=r"item 0 of list.*the label is .*, expected one integer"):
            as_data([(torch.zeros(1, 8, 8), label)])
    for number in (2, np.int64(2), np.array([2]), torch.tensor(2, dtype=torch.uint8), torch.tensor([2])):
        assert as_data([(torch.zeros(1, 8, 8), number)]).batch([0])[1].tolist() == [2]
    with pytest.raises(DataError, match="list has no items"):
        as_data([])


def test_captions_in_memory_are_told_what_to_be() -> None:
    with pytest.raises(DataError, match=r"grafting\.data\.DataSource"):
        as_data((latents(4), captions(4)))


def test_an_explanation_can_be_read() -> None:
    lines = str(grafting.explain(tiny_dit(), PLAN)).splitlines()
    assert lines[0] == "parameters 88,136 -> 89,096 (+1.1%), FLOPs per image 1,796,096 -> 1,753,088 (-2.4%)"
    assert lines[1].startswith("  layer 1 mha: mha -> hyena_x, parameters 4,224 -> 4,704 (+11.4%)")
    dropped = str(grafting.explain(tiny_dit(), [{"prune": {"layers": [2]}}])).splitlines()
    assert dropped[0].endswith("depth 4 -> 3")
    assert dropped[1].startswith("  layer 2 block: block -> nothing")
    assert dropped[1].endswith("-> 0 (-100.0%)")

"""Edited models in diffusers' pipelines, their folders, and the upload."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pixart_tools import latents, save_tiny_pipeline, tiny_pipeline

import grafting
from grafting import GraftPlan, Replace
from grafting.errors import CheckpointError
from grafting.lora import Lora, add_lora, lora_of, lora_targets

PLAN = GraftPlan([Replace("mha", [1, 3], "hyena_x")])


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["the red cat", "a moon"], latents=latents(2), use_resolution_binning=False, height=16, width=16,
        num_inference_steps=2, output_type="np", clean_caption=False,
    ).images  # fmt: skip


def test_what_nothing_could_load_is_not_saved(tmp_path: Path) -> None:
    """diffusers' save_pretrained refuses an edited model, also a copy of it, and no other."""
    from diffusers import PixArtTransformer2DModel

    base = save_tiny_pipeline(tmp_path / "base")
    plain = grafting.load_model(base)
    student = grafting.graft(plain, PLAN)
    grafting.save_graft(student, tmp_path / "graft")
    pipeline = grafting.load_pipeline(base)
    pipeline.transformer = student
    edited: list[Any] = [
        student, copy.deepcopy(student), copy.deepcopy(student).to(torch.bfloat16), pickle.loads(pickle.dumps(student)),
        grafting.load_model(tmp_path / "graft"), grafting.load_pipeline(tmp_path / "graft"), pipeline,
    ]  # fmt: skip
    for thing in edited:
        with pytest.raises(
            CheckpointError, match=r"grafting\.save_pipeline.* or grafting\.save_graft.*can be deleted"
        ):
            thing.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused" / "model_index.json").exists()  # so that nothing takes it for a pipeline
    assert not (tmp_path / "refused" / "transformer").exists()
    plain.save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(again[name], value) for name, value in plain.state_dict().items())
    copied = edited[1].state_dict()
    assert all(torch.equal(copied[name], value) for name, value in student.state_dict().items())


def test_a_graft_is_a_pipeline_again_and_stock_loaders_refuse_it(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    base = save_tiny_pipeline(tmp_path / "base")
    student = grafting.graft(grafting.load_model(base), PLAN)
    add_lora(student, Lora(rank=2, alpha=2, targets=lora_targets(student, None)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    grafting.save_graft(student, tmp_path / "graft")
    pipeline = grafting.load_pipeline(tmp_path / "graft")
    assert isinstance(pipeline, PixArtSigmaPipeline)
    wanted = draw(pipeline)
    assert wanted.shape == (2, 16, 16, 3)
    assert not np.array_equal(wanted, draw(grafting.load_pipeline(base)))
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    pipeline.transformer.set_default_attn_processor()
    assert np.abs(draw(pipeline) - wanted).max() < 1e-3

    for merge in (False, True):
        out = tmp_path / f"merged-{merge}"
        grafting.save_pipeline(student, out, merge=merge)
        again = grafting.load_pipeline(out)
        np.testing.assert_allclose(draw(again), wanted, atol=1e-3)
        assert (lora_of(again.transformer) is None) == merge
        with pytest.raises(OSError):
            PixArtTransformer2DModel.from_pretrained(out / "transformer")
        for fast in (True, False):
            with pytest.raises(OSError):
                PixArtTransformer2DModel.from_pretrained(out, subfolder="transformer", low_cpu_mem_usage=fast)
            for stock in (PixArtSigmaPipeline, DiffusionPipeline):
                with pytest.raises((OSError, ValueError, AttributeError, ImportError)):
                    stock.from_pretrained(out, low_cpu_mem_usage=fast)
        with pytest.raises(CheckpointError, match="not an empty folder"):
            grafting.save_pipeline(student, out)
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append(("create", repo, options["private"]))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options["repo_id"], options["folder_path"]))

    out = tmp_path / "merged-False"
    assert grafting.push_to_hub(out, "me/graft", private=True, api=Hub()) == "https://huggingface.co/me/graft"
    assert calls == [("create", "me/graft", True), ("upload", "me/graft", str(out))]
    card = (out / "README.md").read_text()
    assert "grafting.load_pipeline" in card
    assert '"hyena_x"' in card
    assert "rank 2" in card
    assert str(tmp_path) not in card


def test_a_pipeline_in_memory_is_written_around_its_edited_transformer(tmp_path: Path) -> None:
    base = save_tiny_pipeline(tmp_path / "base")
    plain = grafting.load_pipeline(base)
    pipeline = type(plain)(**{**plain.components, "transformer": tiny_pipeline().transformer})
    pipeline.transformer = grafting.graft(pipeline.transformer, PLAN)
    with torch.no_grad():  # what is in memory is what is written
        next(pipeline.text_encoder.parameters()).mul_(1.5)
    wanted = draw(pipeline)
    with pytest.raises(CheckpointError, match=r"does not say which pipeline.*pipeline="):
        grafting.save_pipeline(pipeline.transformer, tmp_path / "out")
    grafting.save_pipeline(pipeline.transformer, tmp_path / "out", pipeline=pipeline)
    assert np.array_equal(draw(grafting.load_pipeline(tmp_path / "out")), wanted)
    written = [path.read_text() for kind in ("json", "md") for path in (tmp_path / "out").rglob(f"*.{kind}")]
    assert str(tmp_path) not in "".join(written)


def test_a_part_that_can_t_be_written_is_named(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    student = grafting.graft(pipeline.transformer, PLAN)
    pipeline.register_modules(vae=torch.nn.Identity())
    with pytest.raises(CheckpointError, match=r"can't write the vae of the pipeline: .*save_pretrained"):
        grafting.save_pipeline(student, tmp_path / "out", pipeline=pipeline)
    with pytest.raises(CheckpointError, match="not from a float"):
        grafting.save_pipeline(student, tmp_path / "other", pipeline=0.5)


def test_an_object_is_no_source(tmp_path: Path) -> None:
    pipeline: Any = tiny_pipeline()
    with pytest.raises(CheckpointError, match=r"source is a PixArtSigmaPipeline; use its \.transformer"):
        grafting.load_model(pipeline)
    with pytest.raises(CheckpointError, match=r"source is a PixArtTransformer2DModel; it is a model already"):
        grafting.load_model(pipeline.transformer)
    with pytest.raises(CheckpointError, match=r"source is a NoneType; give the name"):
        grafting.load_model(None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"pipeline is a PixArtSigmaPipeline; "):
        grafting.load_model(save_tiny_pipeline(tmp_path / "base"), pipeline=pipeline)
    with pytest.raises(CheckpointError, match=r"not from a PixArtSigmaPipeline"):
        grafting.load_pipeline(tmp_path / "base", pipeline)

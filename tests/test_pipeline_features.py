"""What diffusers offers around a transformer goes on working with an edited one: through `load_pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pixart_tools import captions, latents, save_tiny_pipeline, tiny_transformer

import grafting
from grafting import GraftPlan, Replace

PLAN = GraftPlan([Replace("mha", [1], "hyena_x"), Replace("mha", [3], "swa"), Replace("mlp", [0], "mlp")])

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("features")
    base = save_tiny_pipeline(at / "base")
    grafting.save_graft(grafting.graft(grafting.load_model(base), PLAN), at / "graft")
    return at / "graft"


@pytest.fixture
def pipeline(folder: Path) -> Any:
    loaded = grafting.load_pipeline(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: Any) -> np.ndarray:
    return pipeline(
        ["the red cat", "a moon"], latents=latents(2, 8, 12), use_resolution_binning=False, height=16, width=24,
        num_inference_steps=2, output_type="np", clean_caption=False,
    ).images  # fmt: skip


def called(model: Any) -> torch.Tensor:
    """One prediction, called as the pipeline does."""
    cond = captions(2)
    return model(
        latents(2), encoder_hidden_states=cond.embeds, timestep=torch.tensor([10, 700]),
        encoder_attention_mask=cond.mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample  # fmt: skip


def test_attention_processors_and_backends(pipeline: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model, wanted = pipeline.transformer, draw(pipeline)
    left = [name for name in model.attn_processors if ".attn1." in name]
    assert left == ["transformer_blocks.0.attn1.processor", "transformer_blocks.2.attn1.processor"]
    model.set_attn_processor(AttnProcessor())
    assert {type(p) for p in model.attn_processors.values()} == {AttnProcessor}
    np.testing.assert_allclose(draw(pipeline), wanted, atol=1e-4)
    model.set_attn_processor({name: AttnProcessor2_0() for name in model.attn_processors})
    np.testing.assert_allclose(draw(pipeline), wanted, atol=1e-4)
    model.set_attention_backend("native")
    np.testing.assert_allclose(draw(pipeline), wanted, atol=1e-4)
    model.reset_attention_backend()
    for kernel in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(kernel):
            np.testing.assert_allclose(draw(pipeline), wanted, atol=1e-4)


def test_a_compiled_transformer_is_one_graph_and_gives_the_same(pipeline: Any) -> None:
    wanted = draw(pipeline)
    torch._dynamo.reset()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="aot_eager", fullgraph=True)
    np.testing.assert_allclose(draw(pipeline), wanted, atol=1e-4)
    torch._dynamo.reset()


def test_vae_slicing_and_tiling(pipeline: Any) -> None:
    wanted = draw(pipeline)
    pipeline.vae.enable_slicing()
    np.testing.assert_allclose(draw(pipeline), wanted, atol=1e-5)
    pipeline.vae.disable_slicing()
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 8, 16  # two tiles, side by side
    tiled = draw(pipeline)
    assert tiled.shape == wanted.shape
    assert not np.array_equal(tiled, wanted)
    assert np.abs(tiled - wanted).mean() < 0.1


@pytest.mark.parametrize(
    ("target", "operator"),
    [("mha", name) for name in ("swa", "hyena_se", "hyena_x", "hyena_y", "mamba2")]
    + [("mlp", "mlp"), ("mlp", "mlp_hyena_x")],
)
def test_weights_that_come_for_a_pass_and_go(target: str, operator: str) -> None:
    """What sequential CPU offload does: hooks of accelerate bring a module's weights for its forward pass alone."""
    from accelerate import cpu_offload

    model: Any = grafting.graft(tiny_transformer(num_layers=2), GraftPlan([Replace(target, [1], operator)]))
    new = model.transformer_blocks[1].attn1 if target == "mha" else model.transformer_blocks[1].ff
    with torch.no_grad():
        eager = called(model)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in new.parameters())
        torch.testing.assert_close(called(model), eager)
    assert all(p.is_meta for p in new.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers' CPU offload needs an accelerator")
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(pipeline: Any, how: str) -> None:
    wanted = draw(pipeline)
    getattr(pipeline, how)()
    np.testing.assert_allclose(draw(pipeline), wanted, atol=1e-2)


def test_half_precision(folder: Path) -> None:
    half = grafting.load_pipeline(folder, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    images = half(
        ["the red cat", "a moon"], use_resolution_binning=False, height=16, width=24, num_inference_steps=2,
        output_type="np", clean_caption=False, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert images.shape == (2, 16, 24, 3)
    assert np.isfinite(images).all()

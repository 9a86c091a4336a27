"""Family pixart: equal to diffusers' own class bit for bit, editable, savable, at any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pixart_tools import captions, latents, save_tiny_pipeline, tiny_pipeline, tiny_transformer
from torch import Tensor, nn

import grafting
from grafting import GraftPlan, Replace
from grafting.analysis.latency import amdahl
from grafting.conditioning import Caption
from grafting.diffusion import sample
from grafting.errors import CheckpointError, DataError, GraftError, OperatorError
from grafting.families import family_of
from grafting.inspection import inspect_model

T = torch.tensor([0, 437, 999])
HALF = GraftPlan([Replace("mha", "interleaved-50", "hyena_x"), Replace("mlp", [0], "mlp", {"ratio": 3})])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_transformer()


def direct(model: nn.Module, x: Tensor, t: Tensor, cond: Caption, **conditions: Any) -> Tensor:
    """diffusers' own call."""
    with torch.no_grad():
        return model(
            x, encoder_hidden_states=cond.embeds, timestep=t, encoder_attention_mask=cond.mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None, **conditions}, return_dict=False,
        )[0]  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (12, 4)])
def test_predictions_are_those_of_diffusers(model: nn.Module, size: tuple[int, int]) -> None:
    family, x, cond = family_of(model), latents(3, *size), captions(3)
    wanted = direct(model, x, T, cond)
    with torch.no_grad():
        assert torch.equal(family.predict(model, x, T, cond), wanted)
        output, features = family.predict_with_features(model, x, T, cond, (0, 3))
    assert torch.equal(output, wanted)
    assert features[3].shape == (3, size[0] * size[1] // 4, 32)


def test_captions_of_other_lengths_do_not_touch_each_other(model: nn.Module) -> None:
    family, x, cond = family_of(model), latents(3), captions(3)
    beyond = cond.mask == 0
    other = cond._replace(embeds=torch.where(beyond[..., None], torch.zeros(()), cond.embeds))
    with torch.no_grad():
        assert torch.equal(family.predict(model, x, T, cond), family.predict(model, x, T, other))
        shorter = family.predict(model, x, T, cond._replace(mask=cond.mask.clone().fill_(1)))
    assert not torch.allclose(shorter, direct(model, x, T, cond))


def test_micro_conditions_of_alpha_are_the_size_in_pixels() -> None:
    model = tiny_transformer(use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=48)
    x, cond = latents(3, 8, 16), captions(3)
    size, ratio = torch.tensor([[64.0, 128.0]]).repeat(3, 1), torch.tensor([[0.5]]).repeat(3, 1)
    with torch.no_grad():
        found = family_of(model).predict(model, x, T, cond)
    assert torch.equal(found, direct(model, x, T, cond, resolution=size, aspect_ratio=ratio))
    assert not torch.equal(found, direct(model, x, T, cond, resolution=size.flip(1), aspect_ratio=ratio))


def test_taps_are_what_the_blocks_use(model: nn.Module) -> None:
    """The residual stream rebuilt from taps and cross-attention alone is the block's output."""
    family, x, cond = family_of(model), latents(3, 8, 16), captions(3)
    paths = [site.path for site in family.sites(model)]
    taps = family.taps(model, x, T, cond, paths)
    assert sorted(taps) == sorted(paths)
    with torch.no_grad():
        _, features = family.predict_with_features(model, x, T, cond, range(4))
        text = model.caption_projection(cond.embeds)
        bias = ((1 - cond.mask) * -10000.0).unsqueeze(1)
        for layer in range(1, 4):
            attention, mlp = (taps[f"transformer_blocks.{layer}.{name}"] for name in ("attn1", "ff"))
            h = attention.gate * attention.output + features[layer - 1]
            h = model.transformer_blocks[layer].attn2(h, encoder_hidden_states=text, attention_mask=bias) + h
            assert torch.equal(mlp.gate * mlp.output + h, features[layer])
            assert torch.equal(model.transformer_blocks[layer].ff(mlp.input), mlp.output)
    only = family.taps(model, x, T, cond, paths[:1])
    assert list(only) == paths[:1]
    assert not any(module._forward_hooks for module in model.modules())


def test_queries_and_keys_give_the_attention(model: nn.Module) -> None:
    family, x = family_of(model), torch.randn(2, 16, 32)
    site = family.sites(model)[0]
    attention: Any = site.donor
    with torch.no_grad():
        q, k = family.queries_and_keys(site, x)
        v = attention.to_v(x).unflatten(2, (4, -1)).transpose(1, 2)
        mixed = ((q @ k.transpose(2, 3)) * 8**-0.5).softmax(-1) @ v
        torch.testing.assert_close(attention.to_out[0](mixed.transpose(1, 2).flatten(2)), attention(x))


def test_sampling_is_the_pipelines_bit_for_bit() -> None:
    pipeline = tiny_pipeline()
    prompts = ["the red cat", "a small house under the blue moon and the green sun"]
    noise = latents(2, 8, 12)
    wanted = pipeline(
        prompts, latents=noise, output_type="latent", use_resolution_binning=False, height=16, width=24,
        num_inference_steps=5, guidance_scale=4.5, clean_caption=False,
    ).images  # fmt: skip
    with torch.no_grad():
        cond = Caption(*pipeline.encode_prompt(prompts, device="cpu"))
    found = sample(pipeline.transformer, noise, cond, steps=5, sampler="dpm++", guidance=4.5)
    assert torch.equal(found, wanted)


def test_a_self_graft_copies_the_donor(model: nn.Module) -> None:
    plan = GraftPlan([Replace("mha", "all", "mha"), Replace("mlp", "all", "mlp")])
    student, x, cond = grafting.graft(model, plan), latents(2), captions(2)
    family = family_of(model)
    with torch.no_grad():
        found, wanted = (family.predict(m, x, T[:2], cond) for m in (student, model))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_operators_ignore_the_hosts_arguments_and_add_no_level(model: nn.Module) -> None:
    student = grafting.graft(model, HALF)
    operator = student.transformer_blocks[1].attn1
    fresh = grafting.operators.build("hyena_x", dim=32, num_heads=4, num_tokens=16)
    assert list(operator.state_dict()) == list(fresh.state_dict())
    x = torch.randn(2, 16, 32)
    mask = torch.ones(2, 1, 16)
    called = operator(hidden_states=x, encoder_hidden_states=None, attention_mask=mask, scale=1.0)
    assert torch.equal(called, operator(x))
    added = {"resolution": None, "aspect_ratio": None}
    cond = captions(2)
    student(
        latents(2), cond.embeds, T[:2], added, cross_attention_kwargs={"ip_adapter_masks": None},
        encoder_attention_mask=cond.mask,
    )  # fmt: skip
    again = grafting.graft(student, GraftPlan([Replace("mha", [0], "swa")]))
    assert torch.equal(again.transformer_blocks[1].attn1(x, None, mask), operator(x))


def test_gradients_reach_new_operators_and_the_rest(model: nn.Module) -> None:
    student = grafting.graft(model, HALF).train()
    student.enable_gradient_checkpointing()
    family, x, cond = family_of(student), latents(2, 8, 16), captions(2)
    family.predict(student, x, T[:2], cond).square().mean().backward()
    plain = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    output, _ = family.predict_with_features(student, x, T[:2], cond, ())
    output.square().mean().backward()
    for parameter, gradient in zip(student.parameters(), plain, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_operator_tied_to_its_tokens_says_so_at_another_size(model: nn.Module) -> None:
    student = grafting.graft(model, GraftPlan([Replace("mlp", [1], "mlp_hyena_x")]))
    family, cond = family_of(student), captions(2)
    family.predict(student, latents(2), T[:2], cond)
    with pytest.raises(OperatorError, match="16 tokens and got 32"):
        family.predict(student, latents(2, 8, 16), T[:2], cond)
    wide = family.resized(model, 8, 16)
    assert (family.sites(wide)[0].num_tokens, family.sites(wide)[0].grid) == (32, (4, 8))
    assert family.sites(model)[0].num_tokens == 16
    assert wide.proj_out is model.proj_out
    student = grafting.graft(wide, GraftPlan([Replace("mlp", [1], "mlp_hyena_x")]))
    family.predict(student, latents(2, 8, 16), T[:2], cond)
    with pytest.raises(DataError, match="9x8 do not fit patches of 2x2"):
        family.resized(model, 9, 8)


# ---- loading and saving


def test_a_pipeline_folder_its_transformer_and_legacy_names_load(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    x, cond = latents(2), captions(2)
    wanted = direct(tiny_transformer(), x, T[:2], cond)
    for source in (folder, folder / "transformer"):
        assert torch.equal(direct(grafting.load_model(source), x, T[:2], cond), wanted)
    config = folder / "transformer" / "config.json"
    legacy = {
        **json.loads(config.read_text()),
        "_class_name": "Transformer2DModel",
        "num_vector_embeds": None,
    }
    config.write_text(json.dumps(legacy))
    assert torch.equal(direct(grafting.load_model(folder), x, T[:2], cond), wanted)
    tiny_transformer().save_pretrained(folder / "transformer", max_shard_size="40KB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert torch.equal(direct(grafting.load_model(folder), x, T[:2], cond), wanted)
    half = grafting.load_model(folder, dtype=torch.bfloat16)
    assert half.proj_out.weight.dtype is torch.bfloat16
    assert half.pos_embed.pos_embed.dtype is torch.float32  # as diffusers' torch_dtype leaves it
    next((folder / "transformer").glob("*00002*")).unlink()
    with pytest.raises(CheckpointError, match="no file"):
        grafting.load_model(folder)
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="FluxTransformer2DModel"):
        grafting.load_model(folder)


def test_a_graft_comes_back_from_its_folder(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    teacher = grafting.load_model(folder)
    family, x, cond = family_of(teacher), latents(2), captions(2)
    student = grafting.graft(family.resized(teacher, 8, 16), HALF)
    with torch.no_grad():
        student.transformer_blocks[1].attn1.out_proj.weight.add_(0.01)
        wanted = family.predict(student, x, T[:2], cond)
    grafting.save_graft(student, tmp_path / "graft")
    manifest = json.loads((tmp_path / "graft" / "graft.json").read_text())
    assert manifest["base"]["source"] == str(folder)
    assert manifest["architecture"]["latent_size"] == [8, 16]
    assert (tmp_path / "graft").stat().st_size < 10_000
    for back in (
        grafting.load_model(tmp_path / "graft"),
        grafting.load_graft(tmp_path / "graft", base=teacher),
    ):
        with torch.no_grad():
            assert torch.equal(family.predict(back, x, T[:2], cond), wanted)
        assert family.sample_shape(back) == (4, 8, 16)


def test_a_self_contained_graft_needs_no_base(tmp_path: Path) -> None:
    student = grafting.graft(tiny_transformer(), HALF)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.001)
    grafting.save_graft(student, tmp_path / "graft")
    back = grafting.load_graft(tmp_path / "graft")
    x, cond = latents(2), captions(2)
    assert torch.equal(direct(back, x, T[:2], cond), direct(student, x, T[:2], cond))


# ---- numbers


def test_the_2k_model_in_numbers() -> None:
    model = grafting.load_model("arch:PixArt-Sigma-2K", device="meta")
    found = inspect_model(model)
    assert found["params"] == 610_856_096
    assert family_of(model).sites(model)[0].num_tokens == 16_384
    assert found["sites"][0]["operator"] == "mha"
    # Per block at 16,384 tokens: scores and sums 4 N^2 D and softmax 2 N^2 H, projections 8 N D^2, MLP 16 N D^2.
    tokens, width = 16_384, 1152
    scores = 4 * tokens**2 * width + 2 * tokens**2 * 16
    assert found["sites"][0]["flops"] == scores + 8 * tokens * width**2
    assert found["sites"][1]["flops"] == 16 * tokens * width**2
    total = found["flops_per_image"]
    assert found["share_of_flops"]["mha"] == pytest.approx(28 * found["sites"][0]["flops"] / total, abs=1e-4)
    assert found["share_of_flops"]["mha without projections"] > 0.62
    plan = GraftPlan([Replace("mha", "8-18:2,20-27", "hyena_x")])
    explanation = grafting.explain(model, plan)
    assert [edit.site.layer for edit in explanation.edits] == [8, 10, 12, 14, 16, 18, *range(20, 28)]
    saved = explanation.flops_per_image[0] - explanation.flops_per_image[1]
    hyena = 2 * tokens * width + 8 * tokens * width**2 + 2 * 4 * 3 * tokens * width
    assert saved == pytest.approx(14 * (found["sites"][0]["flops"] - hyena))
    assert explanation.flops_per_image == pytest.approx((52.61e12, 35.18e12), abs=5e9)
    assert found["share_of_flops"]["mha"] == pytest.approx(0.7556, abs=1e-3)
    assert amdahl(14 / 28 * found["share_of_flops"]["mha"]) == pytest.approx(1.607, abs=2e-3)


def test_flops_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_transformer()
    x, cond = latents(1), captions(1, tokens=300)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        direct(model, x, T[:1], cond)
    softmax = 4 * 2 * 16**2 * 4  # 2 N^2 H per layer, which the counter leaves out
    assert family_of(model).flops_per_image(model) == pytest.approx(counter.get_total_flops() + softmax)


def test_names_of_architectures() -> None:
    shapes = {"Sigma-256": 32, "Sigma-512": 64, "Alpha-1024": 128}
    for name, side in shapes.items():
        model = grafting.load_model(f"arch:PixArt-{name}", device="meta")
        assert family_of(model).sample_shape(model) == (4, side, side)
        assert model.use_additional_conditions == (name == "Alpha-1024")
    wide = grafting.load_model("arch:PixArt-Sigma-2K@1024x4096", device="meta")
    assert family_of(wide).sites(wide)[0].grid == (64, 256)
    for name in ("PixArt-Sigma-3K", "PixArt-Alpha-2K", "PixArt-Sigma-2K@100x64"):
        with pytest.raises(GraftError, match=r"unknown architecture.*PixArt-Sigma|multiples of 16 pixels"):
            grafting.load_model(f"arch:{name}", device="meta")


def test_data_that_does_not_fit_is_refused(model: nn.Module) -> None:
    family = family_of(model)
    family.check_data(model, "d", (4, 8, 16), 0, 16)
    for shape, width, said in (
        ((3, 8, 8), 16, "4 channels"), ((4, 8, 9), 16, "multiples of 2"), ((4, 8, 8), 0, "class labels, no captions"),
        ((4, 8, 8), 24, "captions of width 24; the model takes captions of width 16"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            family.check_data(model, "d", shape, 0, width)
    dit = grafting.load_model("arch:DiT-S/8", device="meta")
    with pytest.raises(DataError, match="has captions, the model knows 1000 classes"):
        family_of(dit).check_data(dit, "d", (4, 32, 32), 0, 16)

"""The DiT loss and the samplers, against the published code's tensors, diffusers' own steps, and closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, relative, tiny_dit
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grafting import diffusion, draws, generation, load_model
from grafting.diffusion import process
from grafting.diffusion.process import tables
from grafting.diffusion.sampling import _scheduler
from grafting.errors import DataError, GraftError
from grafting.evaluation.samples import SampleFile
from grafting.generation import generate, save_grid

SPEC = json.loads((FIXTURES / "dit.json").read_text())


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    return load_model(FIXTURES / "published_format_base.pt", num_heads=4)


def test_loss_values_and_gradient_are_the_published_ones(reference: dict[str, Tensor]) -> None:
    output = reference["from_output/model_output"].clone().requires_grad_()
    t = reference["from_output/t"]
    assert 0 in t.tolist()  # the discretised likelihood is among them
    found = diffusion.loss_from_output(output, reference["x"], t, reference["noise"])
    for name in ("loss", "mse", "vb"):
        assert found[name].shape == (3,)
        torch.testing.assert_close(found[name], reference[f"from_output/{name}"], atol=1e-5, rtol=1e-5)
    found["loss"].sum().backward()
    gradient = reference["from_output/grad_of_summed_loss"]
    assert (output.grad - gradient).abs().max() <= 1e-5


def test_training_losses_are_the_published_ones(
    published: torch.nn.Module, reference: dict[str, Tensor]
) -> None:
    x0, t, y, noise = (reference[name] for name in ("x", "t", "y", "noise"))
    x_t = diffusion.add_noise(x0, t, noise)
    assert (x_t - reference["q_sample"]).abs().max() <= 1e-5
    with torch.no_grad():
        found = diffusion.training_losses(published, x0, t, y, noise)
    for name in ("loss", "mse", "vb"):
        torch.testing.assert_close(found[name], reference[f"train/{name}"], atol=1e-5, rtol=1e-5)


def test_variance_loss_leaves_the_noise_prediction_alone() -> None:
    torch.manual_seed(0)
    output = torch.randn(3, 2, 8, 8, requires_grad=True)
    x0, noise, t = torch.randn(3, 1, 8, 8).clamp(-1, 1), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 999])
    diffusion.loss_from_output(output, x0, t, noise)["vb"].sum().backward()
    assert output.grad[:, :1].abs().max() == 0
    assert output.grad[:, 1:].abs().min() > 0


def test_a_perfect_prediction_costs_nothing_and_a_wide_posterior_its_kl() -> None:
    """With the true noise and the smallest variance the posteriors agree; with the largest, KL is in closed form."""
    torch.manual_seed(1)
    x0, noise, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([300, 700])
    same = diffusion.loss_from_output(torch.cat([noise, -torch.ones_like(noise)], 1), x0, t, noise)
    assert same["mse"].max() == 0
    assert same["vb"].abs().max() < 1e-5
    wide = diffusion.loss_from_output(torch.cat([noise, torch.ones_like(noise)], 1), x0, t, noise)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    ratio = (1 - bar[t - 1]) / (1 - bar[t])  # beta-tilde over beta
    kl = 0.5 * (-ratio.log() - 1 + ratio) / math.log(2)
    torch.testing.assert_close(wide["vb"].double(), kl, rtol=2e-3, atol=1e-6)


def test_a_model_without_learned_variance_has_the_plain_loss() -> None:
    x0, noise, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0, 500])
    found = diffusion.loss_from_output(torch.zeros(2, 1, 8, 8), x0, t, noise)
    torch.testing.assert_close(found["loss"], noise.square().mean(dim=(1, 2, 3)))
    assert found["vb"].abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 2, 4, 4)])
def test_a_prediction_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    x0 = torch.zeros(2, 1, 8, 8)
    with pytest.raises(DataError, match="expected 1 or 2 channels"):
        diffusion.loss_from_output(torch.zeros(shape), x0, torch.tensor([1, 2]), x0)


def test_losses_stay_in_fp32_under_bf16() -> None:
    x0, noise, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0, 5])
    assert diffusion.add_noise(x0.bfloat16(), t, noise.bfloat16()).dtype == torch.float32
    found = diffusion.loss_from_output(torch.zeros(2, 2, 8, 8, dtype=torch.bfloat16), x0, t, noise)
    assert found["loss"].dtype == torch.float32


def test_the_schedule_is_linear_and_its_posterior_proper() -> None:
    table = tables(torch.device("cpu"))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(table.log_beta.double(), beta.log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        table.sqrt_alpha_bar.double() ** 2 + table.sqrt_one_minus_alpha_bar.double() ** 2,
        torch.ones(1000, dtype=torch.float64), rtol=1e-6, atol=0,
    )  # fmt: skip
    assert (table.posterior_log_variance <= table.log_beta).all()


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 10), ("ddpm", 25), ("ddpm", 250)])
def test_timesteps_are_the_published_ones(sampler: str, steps: int) -> None:
    found = _scheduler(sampler, steps, torch.device("cpu")).timesteps.tolist()
    assert sorted(found) == SPEC[f"{sampler}{steps}_timesteps"]
    assert found == sorted(found, reverse=True)


def test_ddim_chain_is_the_published_one(published: torch.nn.Module, reference: dict[str, Tensor]) -> None:
    found = diffusion.sample(published, reference["noise"], reference["y"], steps=10, sampler="ddim")
    assert relative(found, reference["ddim10"]) < 1e-3


def test_ddpm_chain_is_the_published_one(published: torch.nn.Module, reference: dict[str, Tensor]) -> None:
    noises = reference["ddpm25/noises"]
    arguments: dict[str, Any] = {"steps": 25, "sampler": "ddpm"}
    found = diffusion.sample(published, reference["noise"], reference["y"], step_noise=noises, **arguments)
    assert relative(found, reference["ddpm25/final"]) < 1e-3
    called = diffusion.sample(
        published, reference["noise"], reference["y"], step_noise=lambda step: noises[step], **arguments
    )
    assert torch.equal(called, found)


class _FirstStep(Exception):
    pass


def test_first_ddpm_step_is_the_published_one(
    published: torch.nn.Module, reference: dict[str, Tensor]
) -> None:
    seen = []

    def stop(step: int) -> Tensor:
        if step == 1:
            raise _FirstStep
        return reference["ddpm25/noises"][step]

    handle = published.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with pytest.raises(_FirstStep):
            diffusion.sample(
                published, reference["noise"], reference["y"], steps=25, sampler="ddpm", step_noise=stop
            )
    finally:
        handle.remove()
    assert relative(seen[1], reference["ddpm25/step0"]) < 1e-5


def test_every_ddpm_step_is_that_of_diffusers() -> None:
    """The scheduler draws its own noise; with torch's generator at the same state ours is the same chain."""
    from diffusers import DDPMScheduler

    model = tiny_dit(seed=5)
    noise, y, steps = torch.randn(2, 1, 8, 8), torch.tensor([0, 3]), 8
    step_noise = torch.randn(steps, 2, 1, 8, 8)
    scheduler = DDPMScheduler(
        1000,
        1e-4,
        0.02,
        "linear",
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    import diffusers.schedulers.scheduling_ddpm as module

    queue = iter(step_noise)
    original, module.randn_tensor = module.randn_tensor, lambda *args, **kwargs: next(queue)
    try:
        x = noise
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                output = model(x, timestep.expand(2), y)
            x = scheduler.step(output, timestep, x).prev_sample
    finally:
        module.randn_tensor = original
    found = diffusion.sample(model, noise, y, steps=steps, sampler="ddpm", step_noise=step_noise)
    assert relative(found, x) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_samplers_are_a_plain_diffusers_loop(sampler: str, guidance: float) -> None:
    import diffusers

    model = tiny_dit(seed=6, in_channels=4)
    noise, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    if sampler == "ddim":
        scheduler: Any = diffusers.DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(1000, 1e-4, 0.02, "linear")
    scheduler.set_timesteps(7)
    x, null = noise * scheduler.init_noise_sigma, torch.tensor([4, 4])
    for timestep in scheduler.timesteps:
        t = timestep.expand(2)
        with torch.no_grad():
            epsilon, empty = model(x, t, y)[:, :4], model(x, t, null)[:, :4]
        epsilon[:, :3] = empty[:, :3] + guidance * (epsilon[:, :3] - empty[:, :3])
        x = scheduler.step(epsilon, timestep, x).prev_sample
    found = diffusion.sample(model, noise, y, steps=7, sampler=sampler, guidance=guidance)
    assert relative(found, x) < 1e-5


def test_sampling_does_not_depend_on_torch_s_generator() -> None:
    model, y = tiny_dit(), torch.tensor([0, 1])
    noise = draws.normal(0, "x", torch.arange(2), (1, 8, 8))
    first = diffusion.sample(model, noise, y, steps=3)
    torch.manual_seed(99)
    assert torch.equal(diffusion.sample(model, noise, y, steps=3), first)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"sampler": "euler"}, "unknown sampler"), ({"steps": 0}, "steps=0"), ({"steps": 1001}, "1001"),
        ({"steps": 2.5}, "2.5"), ({"sampler": "ddpm", "step_noise": torch.zeros(3, 2, 1, 8, 8)}, "step_noise"),
    ],
)  # fmt: skip
def test_bad_sampling_arguments_are_refused(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(GraftError, match=word):
        diffusion.sample(
            tiny_dit(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), **{"steps": 2, **arguments}
        )


def test_ddpm_needs_learned_variance_and_guidance_a_null_class() -> None:
    noise, y = torch.zeros(1, 1, 8, 8), torch.tensor([0])
    with pytest.raises(GraftError, match="learned variance"):
        diffusion.sample(tiny_dit(learn_sigma=False), noise, y, steps=2, sampler="ddpm")
    with pytest.raises(GraftError, match="guidance 1"):
        diffusion.sample(tiny_dit(null_class=False), noise, y, steps=2, guidance=2.0)
    assert diffusion.sample(tiny_dit(null_class=False), noise, y, steps=2).shape == noise.shape


def images_of(path: Path) -> Tensor:
    return torch.cat([torch.from_numpy(part) for part in SampleFile.open(path).images()]).int()


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_an_image_does_not_depend_on_the_batch_size(tmp_path: Path, sampler: str) -> None:
    model = tiny_dit(seed=7)
    common: dict[str, Any] = {"num": 11, "steps": 5, "sampler": sampler, "guidance": 1.5, "seed": 4}
    whole = images_of(generate(model, tmp_path / "a.npz", batch_size=11, **common))
    parts = images_of(generate(model, tmp_path / "b.npz", batch_size=3, **common))
    fewer = images_of(generate(model, tmp_path / "c.npz", batch_size=2, **{**common, "num": 5}))
    assert whole.float().std() > 10  # not all black
    assert (whole - parts).abs().max() <= 1
    assert (whole[:5] - fewer).abs().max() <= 1
    assert SampleFile.open(tmp_path / "a.npz").labels.tolist() == [i % 4 for i in range(11)]
    assert (tmp_path / "a.png").is_file()


def sheet(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_sheet_of_large_images_stays_a_file_that_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = np.zeros((1, 2048, 1024, 1), np.uint8), np.full((1, 2048, 1024, 1), 200, np.uint8)
    save_grid(np.concatenate([left, right] * 5)[:9], tmp_path / "large.png", columns=3)  # 19 megapixels
    large = sheet(tmp_path / "large.png")
    assert large.shape == (3 * 1885 + 4, 3 * 942 + 4)
    assert 15_900_000 < 9 * 1885 * 942 <= 16_000_000
    assert (large[100, 100], large[100, 1000], large[100, 2000]) == (0, 200, 0)
    save_grid(np.concatenate([left, right]), tmp_path / "small.png", columns=2)
    assert sheet(tmp_path / "small.png").shape == (2048, 2 * 1024 + 2)  # fits as it is

    monkeypatch.setattr(generation, "SHEET_PIXELS", 12 * 5 * 5)  # 11 samples in rows of 4, three rows
    model = tiny_dit(seed=7)
    path = generate(model, tmp_path / "a.npz", num=11, steps=2, batch_size=4)
    assert images_of(path).shape == (11, 8, 8, 1)
    assert sheet(tmp_path / "a.png").shape == (3 * 5 + 4, 4 * 5 + 6)


def test_another_seed_gives_other_images(tmp_path: Path) -> None:
    model = tiny_dit(seed=7)
    a, b = (images_of(generate(model, tmp_path / f"{s}.npz", num=4, steps=2, seed=s)) for s in (0, 1))
    assert (a - b).abs().float().mean() > 5


@pytest.mark.parametrize(
    "arguments",
    [{"num": 0}, {"batch_size": 0}, {"guidance": float("nan")}, {"guidance": -1.0}, {"sampler": "x"}],
)
def test_generate_refuses_and_leaves_nothing(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(GraftError):
        generate(tiny_dit(), tmp_path / "x.npz", **{"num": 2, "steps": 2, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_tables_of_an_estimate_are_not_kept() -> None:
    process._kept.cache_clear()
    t = torch.tensor([0, 999])
    with FakeTensorMode():
        found = process.tables(torch.device("cpu"))
        assert process.at(found.sqrt_alpha_bar, torch.zeros(2, dtype=torch.int64)).shape == (2, 1, 1, 1)
    kept = process.tables(torch.device("cpu"))
    assert process.at(kept.sqrt_alpha_bar, t)[0, 0, 0, 0].item() == pytest.approx((1 - 1e-4) ** 0.5)
    with FakeTensorMode():  # nor are those with values given to an estimate, which can't compute with them
        again = process.tables(torch.device("cpu"))
        assert process.at(again.log_beta, torch.zeros(2, dtype=torch.int64)).shape == (2, 1, 1, 1)

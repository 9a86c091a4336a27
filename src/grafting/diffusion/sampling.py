"""Samplers on diffusers' schedulers, with the timestep spacing of the published DiT and explicit noise.

Axes: B batch, C channels, H W height and width, S steps. Latents stay in float32 whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grafting.diffusion.prediction import predict
from grafting.diffusion.process import BETA_END, BETA_START, NUM_TIMESTEPS
from grafting.errors import GraftError

SAMPLERS = ("ddim", "ddpm", "dpm++")


def _scheduler(sampler: str, steps: int, device: torch.device) -> Any:
    """The diffusers scheduler of a sampler, its timesteps set.

    `ddpm` spaces its steps as the published respacing "N" does (linspace, rounded), `ddim` as "ddimN" (leading).
    """
    import diffusers

    common: dict[str, Any] = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "linear",
    }
    if sampler not in SAMPLERS:
        raise GraftError(f"unknown sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= NUM_TIMESTEPS:
        raise GraftError(f"steps={steps!r}: expected a whole number from 1 to {NUM_TIMESTEPS}")
    scheduler: Any
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(
            **common, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
        )
    elif sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(
            **common, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
        )
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**common)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _ancestral_step(
    alpha_bar: Tensor, alpha_bar_previous: Tensor, output: Tensor, x: Tensor, noise: Tensor | None
) -> Tensor:
    """One DDPM step x_t -> x_prev with learned-range variance (Improved DDPM eq. 15) and the given noise.

    The scheduler's own step draws its noise internally; this is the same step with the noise as an argument.
    """
    epsilon, fraction = output.chunk(2, dim=1)
    alpha = alpha_bar / alpha_bar_previous
    beta = 1 - alpha
    x0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    mean = (beta * alpha_bar_previous.sqrt() * x0 + (1 - alpha_bar_previous) * alpha.sqrt() * x) / (
        1 - alpha_bar
    )
    if noise is None:
        return mean
    low = (beta * (1 - alpha_bar_previous) / (1 - alpha_bar)).clamp(min=1e-20).log()
    fraction = (fraction + 1) / 2
    return mean + torch.exp(0.5 * (fraction * beta.log() + (1 - fraction) * low)) * noise


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    cond: Any,
    *,
    steps: int,
    sampler: str = "ddim",
    guidance: float = 1.0,
    step_noise: Tensor | Callable[[int], Tensor] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw x0 [B, C, H, W] from start noise [B, C, H, W] under conditioning `cond`.

    sampler: "ddpm" (ancestral, learned-range variance), "ddim" (eta 0), "dpm++" (DPM-Solver++ 2M).
    guidance: classifier-free scale; 1 means none and costs one pass a step instead of two.
    step_noise: for "ddpm", [S, B, C, H, W] or a function of the step number -> [B, C, H, W]; default: torch's
    global generator. The last step takes none.
    on_step: called with the step's number and its timestep before the model is.
    """
    scheduler = _scheduler(sampler, steps, noise.device)
    if isinstance(step_noise, Tensor) and step_noise.shape != (steps, *noise.shape):
        raise GraftError(
            f"step_noise has shape {list(step_noise.shape)}; expected [steps, B, C, H, W] = "
            f"{[steps, *noise.shape]}"
        )
    channels = noise.shape[1]
    x = noise.float() * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps.tolist()
    alpha_bars = scheduler.alphas_cumprod.tolist()
    for index, timestep in enumerate(timesteps):
        if on_step is not None:
            on_step(index, timestep)
        t = torch.full((len(x),), timestep, device=x.device, dtype=torch.int64)
        output = predict(model, x, t, cond, guidance).float()
        if sampler != "ddpm":
            x = scheduler.step(output[:, :channels], timestep, x).prev_sample
            continue
        if output.shape[1] != 2 * channels:
            raise GraftError("sampler 'ddpm' needs a model with learned variance; use 'ddim' or 'dpm++'")
        last = index == len(timesteps) - 1
        if last:
            step: Tensor | None = None
        elif step_noise is None:
            step = torch.randn_like(x)
        else:
            step = step_noise(index) if callable(step_noise) else step_noise[index]
        alpha_bar, previous = (
            torch.tensor(value, dtype=torch.float32, device=x.device)
            for value in (alpha_bars[timestep], 1.0 if last else alpha_bars[timesteps[index + 1]])
        )
        x = _ancestral_step(alpha_bar, previous, output, x, step)
    return x

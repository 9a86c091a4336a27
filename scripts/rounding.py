"""What bf16 autocast does to a model's image x0 along its own sampling path: the figures of docs/precision.md.

    python scripts/rounding.py dit-fashion
    python scripts/rounding.py pixart-emoji

Per timestep, the squared error of x0 = (x - sqrt(1 - a) e) / sqrt(a) against float32, over the variance of x0 among the
samples: with autocast everywhere, and with the first and the last layer left out of it, as the package does.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from grafting import draws, load_model
from grafting.data.packaged_captions import PackagedCaptions
from grafting.diffusion.process import BETA_END, BETA_START, tables
from grafting.families import family_of, pixart
from grafting.models import dit


@contextlib.contextmanager
def plain_autocast() -> Any:
    """While inside, no layer is left out of autocast."""
    kept = dit.unrounded, pixart.calls_unrounded
    dit.unrounded = pixart.calls_unrounded = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    try:
        yield
    finally:
        dit.unrounded, pixart.calls_unrounded = kept


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    model = load_model(arguments.model).eval()
    family, index = family_of(model), torch.arange(arguments.num)
    x = draws.normal(5, "rounding", index, family.sample_shape(model))
    channels, table = x.shape[1], tables(x.device)
    predict = predictor(model, index)
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear"
    )
    scheduler.set_timesteps(arguments.steps)
    print("timestep  autocast everywhere  but first and last layer")
    for t in scheduler.timesteps:
        times, a = t.expand(len(index)), table.sqrt_alpha_bar[t].square()

        def image(e: Tensor, x: Tensor = x, a: Tensor = a) -> Tensor:
            return (x - (1 - a).sqrt() * e.float()[:, :channels]) / a.sqrt()

        noise = predict(x, times)[:, :channels]
        right = image(noise)
        shares = []
        for context in (plain_autocast(), contextlib.nullcontext()):
            with context, torch.autocast(x.device.type, torch.bfloat16):
                shares.append(
                    (image(predict(x, times)) - right).square().sum() / (right - right.mean(0)).square().sum()
                )
        print(f"{int(t):8d}  {shares[0]:19.4f}  {shares[1]:24.4f}", flush=True)
        x = scheduler.step(noise, t, x).prev_sample


def predictor(model: nn.Module, index: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's prediction, each sample with a class or a caption of its own."""
    family = family_of(model)
    classes = family.num_classes(model)
    captions: Any = None if classes else PackagedCaptions("emoji-held-out")
    cond = index % classes if classes else captions.conditions(index % len(captions))
    return lambda x, t: family.predict(model, x, t, cond)


if __name__ == "__main__":
    main()

"""From what a model denoises to images: the identity for pixel models, a VAE for latent ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from grafting.errors import GraftError
from grafting.evaluation.samples import to_uint8
from grafting.families.base import family_of

SD_VAE, SD_SCALING = "stabilityai/sd-vae-ft-ema", 0.18215
Decoder = Callable[[Tensor], np.ndarray]


def decoder(model: nn.Module, vae: str | None = None, device: torch.device | str = "cpu") -> Decoder:
    """How samples of `model` become uint8 images [N, H, W, C].

    One or three channels are pixels. Four are latents of `vae`, a folder or hub id of diffusers' AutoencoderKL
    (default: sd-vae-ft-ema), scaled by its own factor (0.18215).
    """
    channels = family_of(model).sample_shape(model)[0]
    if channels in (1, 3):
        return to_uint8
    if channels != 4:
        raise GraftError(
            f"no codec for samples of {channels} channels; sample from Python and decode them yourself"
        )
    from diffusers import AutoencoderKL

    try:
        autoencoder = AutoencoderKL.from_pretrained(vae or SD_VAE).to(device).eval()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraftError(
            f"can't load the VAE {vae or SD_VAE!r}: {reason[:160]}; give a folder or hub id with --vae"
        ) from None
    scaling = float(autoencoder.config.scaling_factor or SD_SCALING)

    @torch.no_grad()
    def decode(latents: Tensor) -> np.ndarray:
        parts = [autoencoder.decode((part / scaling).to(device)).sample for part in latents.split(8)]
        return to_uint8(torch.cat(parts))

    return decode

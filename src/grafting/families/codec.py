"""Between images and what a model denoises: the identity for pixel models, a VAE for latent ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grafting.errors import CheckpointError, DataError, GraftError
from grafting.evaluation.samples import to_uint8
from grafting.families.base import SD_VAE, family_of
from grafting.formats.diffusers_folder import variant_of
from grafting.formats.weights import combined_digest, digests

SD_SCALING = 0.18215
SD_VAES = (SD_VAE, "stabilityai/sd-vae-ft-mse")  # one encoder, two decoders
Decoder = Callable[[Tensor], np.ndarray]
_ENCODER = ("encoder.", "quant_conv.")
_AT_ONCE = 8  # images that a VAE decodes at once, of at most this many latents together
_LATENTS_AT_ONCE = 8 * 64**2  # 8 images of 512x512 pixels


def load_vae(source: str | None = None, device: torch.device | str = "cpu") -> Any:
    """diffusers' AutoencoderKL in float32 from a folder or hub id (default: sd-vae-ft-ema).

    A folder or hub id of a whole pipeline gives its `vae`. Raises `GraftError`.
    """
    name = source or SD_VAE
    inner = Path(name) / "vae"
    try:
        loaded = _from_folder(str(inner) if (inner / "config.json").is_file() else name)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraftError(
            f"can't load the VAE {name!r}: {reason[:160]}; give a folder or hub id (--vae, or sample.vae in a recipe)"
        ) from None
    return move_vae(loaded, device, torch.float32).eval().requires_grad_(False)


def _from_folder(name: str) -> Any:
    """diffusers' AutoencoderKL of a folder, or of a hub id: at its root, or that of a whole pipeline."""
    from diffusers import AutoencoderKL

    if Path(name).is_dir():
        return AutoencoderKL.from_pretrained(name, variant=variant_of(Path(name)))
    try:
        return AutoencoderKL.from_pretrained(name)
    except OSError as error:  # what diffusers raises where a repository has no such file
        try:
            return AutoencoderKL.from_pretrained(name, subfolder="vae")
        except OSError:
            raise error from None


def move_vae(vae: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """The VAE on a device and in a type (diffusers' own `to` has remarks about types on every call)."""
    return nn.Module.to(vae, device=torch.device(device), dtype=dtype)


def scaling_of(vae: Any) -> tuple[float, float]:
    """(scaling, shift) of a VAE: latents are (z - shift) * scaling. From its configuration, else 0.18215 and 0."""
    return float(vae.config.scaling_factor or SD_SCALING), float(
        getattr(vae.config, "shift_factor", None) or 0.0
    )


def vae_hashes(vae: nn.Module) -> tuple[str, str]:
    """SHA-256 over all weights of a VAE, and over those of its encoder alone."""
    by_name = digests(vae)
    encoder = {name: digest for name, digest in by_name.items() if name.startswith(_ENCODER)}
    return combined_digest(by_name), combined_digest(encoder)


def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 [B, C, h, w], of the VAE's posterior for pixels [B, 3, H, W] in [-1, 1]."""
    found = vae.encode(pixels.to(vae.dtype)).latent_dist
    return found.mean.float(), torch.exp(0.5 * found.logvar.float())


def decoder(model: nn.Module, vae: str | None = None, device: torch.device | str = "cpu") -> Decoder:
    """How samples of `model` become uint8 images [N, H, W, C].

    One or three channels are pixels, and `vae` is then refused. Others are latents of `vae`, a folder or hub id of
    diffusers' AutoencoderKL (default: that of the pipeline that the model came from, else the family's, which for
    `dit` is sd-vae-ft-ema and for `pixart` none), scaled by its own factor. Raises `GraftError`.
    """
    autoencoder = _vae_of(model, vae, device)
    if autoencoder is None:
        return to_uint8
    scaling, shift = scaling_of(autoencoder)

    @torch.no_grad()
    def decode(latents: Tensor) -> np.ndarray:
        size = max(1, min(_AT_ONCE, _LATENTS_AT_ONCE // (latents.shape[2] * latents.shape[3])))
        parts = [(part / scaling + shift).to(device) for part in latents.split(size)]
        return np.concatenate([to_uint8(autoencoder.decode(part).sample) for part in parts])

    return decode


def image_shape(model: nn.Module, vae: str | None = None) -> tuple[int, int, int]:
    """(H, W, C) of the images that samples of `model` become by `decoder`. Raises `GraftError`."""
    channels, height, width = family_of(model).sample_shape(model)
    autoencoder = _vae_of(model, vae, "cpu")
    if autoencoder is None:
        return height, width, channels
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return factor * height, factor * width, int(autoencoder.config.out_channels)


def _vae_of(model: nn.Module, vae: str | None, device: torch.device | str) -> Any:
    """The autoencoder of a model of latents; None for a model of pixels."""
    channels = family_of(model).sample_shape(model)[0]
    if channels in (1, 3) and vae is None:
        return None
    if channels in (1, 3):
        raise GraftError(
            f"this model makes pixels and has no use for the VAE {vae!r}: leave it out (--vae, sample.vae)"
        )
    name = own_vae(model) if vae is None else vae
    loaded = load_vae(name, device)
    made = getattr(loaded.config, "latent_channels", channels)
    if made != channels:
        raise GraftError(
            f"samples of this model have {channels} channels, the VAE {name!r} decodes {made}; give the VAE that the "
            "model was trained with (--vae, or sample.vae in a recipe)"
        )
    return loaded


def own_vae(model: nn.Module) -> str:
    """Folder or hub id of the VAE of a model of latents: its pipeline, else its family's. Raises CheckpointError."""
    from grafting.formats.pipeline_folder import home_of

    usual = family_of(model).vae
    try:
        home = home_of(model, ("vae",))
    except CheckpointError as error:
        if usual is not None:
            return usual
        raise CheckpointError(
            f"no VAE for the samples of this model: {error}; or give --vae, sample.vae"
        ) from None
    if (home / "vae" / "config.json").is_file() or usual is None:
        return str(home)
    return usual


def check_latents(data: Any, vae: str | None) -> None:
    """Refuse latents that were made by another encoder than that of `vae` (default: sd-vae-ft-ema).

    Data that does not say which VAE made it passes. VAEs of one encoder and another decoder (sd-vae-ft-ema and
    -mse) are alike here. Raises `DataError` with both names; `GraftError` where `vae` is needed and can't be loaded.
    """
    made = getattr(getattr(data, "manifest", None), "vae", None)
    name = vae or SD_VAE
    if made is None or made.source == name or (made.source in SD_VAES and name in SD_VAES):
        return
    wanted = load_vae(name)
    if (made.scaling_factor, made.shift_factor) == scaling_of(wanted) and (
        made.encoder_sha256 == vae_hashes(wanted)[1]
    ):
        return
    raise DataError(
        f"data {data.name!r} was encoded with the VAE {made.source!r} (scaling {made.scaling_factor:g}), but samples "
        f"of this model are decoded with {name!r}; encode the images again with --vae {name}, or, if the model was "
        f"trained on latents of {made.source!r}, say sample.vae={made.source}"
    )

"""What a text-to-image model is sampled by: prompts of a file, or the captions of pairs; and at which size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from grafting.data.packaged_captions import PackagedCaptions, is_packaged
from grafting.data.prompts import EncodedPrompts
from grafting.data.text import CaptionDataset, CaptionSource
from grafting.errors import GraftError
from grafting.families import family_of
from grafting.formats.pipeline_folder import find_pipeline, vae_factor


def text_inputs(
    model: nn.Module, source: str, *, prompts: str | Path | None = None, data: str | Path | None = None,
    size: tuple[int | None, int | None] = (None, None), limit: int | None = None, dtype: torch.dtype | None = None,
) -> tuple[nn.Module, CaptionSource | None]:  # fmt: skip
    """The model for images of `size` (height, width in pixels), and the captions; None for a model without any.

    source: where the model came from, for the text encoder of its pipeline. prompts: a file, or a packaged name
    (`emoji-held-out`), which needs no encoder. data: pairs, whose size is then taken.
    Raises GraftError.
    """
    family = family_of(model)
    if family.num_classes(model) is not None:
        if prompts or data or any(size):
            raise GraftError(
                "this model takes class numbers, at one size: leave out prompts, data, height and width"
            )
        return model, None
    if prompts and data:
        raise GraftError("give either prompts or data: both are captions")
    if data:
        pairs = CaptionDataset(data)
        return at_size(model, source, size, pairs.shape[1:]), pairs
    if prompts and is_packaged(prompts):
        packaged = PackagedCaptions(str(prompts))
        family.check_data(model, packaged.name, family.sample_shape(model), 0, packaged.caption_width)
        return at_size(model, source, size), packaged
    if prompts:
        device = next(model.parameters()).device
        encoded = EncodedPrompts(prompts, find_pipeline(source), device=device, dtype=dtype, limit=limit)
        return at_size(model, source, size), encoded
    return model, None


def at_size(
    model: nn.Module, source: str, size: tuple[int | None, int | None], latent: tuple[int, int] | None = None
) -> nn.Module:
    """The model for images of `size` pixels; what is None is `latent`'s, or the model's own. Raises GraftError."""
    family = family_of(model)
    rows, columns = latent or family.sample_shape(model)[1:]
    if size == (None, None):
        return family.resized(model, rows, columns)
    factor = vae_factor(find_pipeline(source))
    height, width = size[0] or rows * factor, size[1] or columns * factor
    if height % factor or width % factor:
        raise GraftError(
            f"images of {height}x{width} pixels: the VAE makes {factor}x{factor} pixels of a latent; "
            f"give multiples of {factor}"
        )
    return family.resized(model, height // factor, width // factor)

"""What a text-to-image model is sampled by: prompts of a file, or the captions of pairs; and at which size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from grafting.data.packaged_captions import PackagedCaptions, is_packaged
from grafting.data.prompts import CaptionTokenizer, EncodedPrompts, read_prompts
from grafting.data.text import CaptionDataset, CaptionSource
from grafting.errors import GraftError
from grafting.families import family_of
from grafting.formats.pipeline_folder import home_of, vae_factor
from grafting.sizes import resized


def text_inputs(
    model: nn.Module, *, prompts: str | Path | None = None, data: str | Path | None = None,
    size: tuple[int | None, int | None] = (None, None), limit: int | None = None, dtype: torch.dtype | None = None,
    truncate: bool = False,
) -> tuple[nn.Module, CaptionSource | None]:  # fmt: skip
    """The model for images of `size` (height, width in pixels), and the captions; None for a model without any.

    prompts: a file, which the text encoder of the model's pipeline encodes (truncate: cut where they are too long), or
    a packaged name (`emoji-held-out`), which needs no encoder. data: pairs, whose size is then taken.
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
        return at_size(model, size, pairs.shape[1:]), pairs
    if prompts and is_packaged(prompts):
        return at_size(model, size), _packaged(model, str(prompts))
    if prompts:
        home = home_of(model, ("tokenizer", "text_encoder", "vae"))
        encoded = EncodedPrompts(
            prompts, home, family.architecture(model), device=next(model.parameters()).device, dtype=dtype,
            limit=limit, truncate=truncate,
        )  # fmt: skip
        return at_size(model, size), encoded
    return model, None


def check_prompts(
    model: nn.Module, prompts: str | Path, *, limit: int | None = None, truncate: bool = False
) -> None:
    """Raise what `text_inputs` would of these prompts, without the weights of the text encoder. Raises GraftError."""
    if is_packaged(prompts):
        _packaged(model, str(prompts))
        return
    found = read_prompts(prompts)[:limit]
    tokenizer = CaptionTokenizer(home_of(model, ("tokenizer",)), family_of(model).architecture(model))
    if not truncate:
        tokenizer.check_lengths(found, str(prompts))


def _packaged(model: nn.Module, name: str) -> PackagedCaptions:
    captions, family = PackagedCaptions(name), family_of(model)
    family.check_data(model, captions.name, family.sample_shape(model), 0, captions.caption_width)
    return captions


def at_size(
    model: nn.Module, size: tuple[int | None, int | None], latent: tuple[int, int] | None = None
) -> nn.Module:
    """The model for images of `size` pixels; what is None is `latent`'s, or the model's own. Raises GraftError."""
    family = family_of(model)
    rows, columns = latent or family.sample_shape(model)[1:]
    if size == (None, None):
        return resized(model, rows, columns)
    factor = vae_factor(home_of(model, ("vae",)))
    height, width = size[0] or rows * factor, size[1] or columns * factor
    if height % factor or width % factor:
        raise GraftError(
            f"images of {height}x{width} pixels: the VAE makes {factor}x{factor} pixels of a latent; "
            f"give multiples of {factor}"
        )
    return resized(model, height // factor, width // factor)

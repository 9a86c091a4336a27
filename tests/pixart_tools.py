"""A tiny PixArt-Sigma in diffusers' layout, every weight drawn, with a real T5 and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafting.conditioning import Caption

SENTENCE = "a the red green blue small big cat dog car tree house on under near with and sun moon sea"
WORDS = SENTENCE.split()


def draw_weights(model: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Normal weights in every parameter, so that no gate is zero and no block the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = 0.1 if parameter.ndim == 1 else scale
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model.eval()


def tiny_transformer(seed: int = 0, **changes: Any) -> Any:
    """4 blocks of width 32, 8x8 latents of 4 channels: 16 tokens; captions of width 16."""
    from diffusers import PixArtTransformer2DModel

    shape: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 4,
        "cross_attention_dim": 32, "sample_size": 8, "patch_size": 2, "caption_channels": 16,
        "interpolation_scale": 1, "use_additional_conditions": False, **changes,
    }  # fmt: skip
    return draw_weights(PixArtTransformer2DModel(**shape), seed)


def tiny_pipeline(seed: int = 0, **changes: Any) -> Any:
    """PixArtSigmaPipeline of that transformer; the VAE halves each side, so images are 16x16."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    text = T5EncoderModel(
        T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, sample_size=16,
        scaling_factor=0.5,
    )  # fmt: skip
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=draw_weights(text, seed + 1), vae=draw_weights(vae, seed + 2, 0.1),
        transformer=tiny_transformer(seed, **changes), scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_pipeline(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """That pipeline in a folder."""
    tiny_pipeline(seed, **changes).save_pretrained(folder)
    return folder


def captions(batch: int, seed: int = 5, tokens: int = 12, width: int = 16) -> Caption:
    """Random captions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(batch) % (tokens - 1) + 2

    def drawn() -> Tensor:
        return torch.randn(batch, tokens, width, generator=generator)

    positions = torch.arange(tokens)[None]
    return Caption(
        drawn(), (positions < lengths[:, None]).long(), drawn()[:1].expand(batch, -1, -1),
        (positions < 1).long().expand(batch, -1),
    )  # fmt: skip


def latents(batch: int, height: int = 8, width: int = 8, seed: int = 6) -> Tensor:
    """Random latents."""
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))

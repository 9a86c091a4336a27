"""State dicts of DiT: shape inference for the published layout, and diffusers' layout both ways.

diffusers' `DiTTransformer2DModel` keeps a copy of the timestep and label embedders in every block, splits qkv, and
has no position table; `DiT` computes what the published code computes (diffusers' class shifts the timestep
frequencies by one and uses another epsilon in one norm; docs/python.md has by how much that differs). What else makes
another function there, embedders of their own in the blocks or other settings, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grafting.errors import CheckpointError
from grafting.formats.weights import Tensors
from grafting.models.dit import DiTConfig, known_heads, sincos_2d

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_AT_ROOT = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# Settings of diffusers' class that make another function, and the values that a DiT has. One that config.json does not
# state is the class's default, the first. (dropout is off in evaluation; upcast_attention is a matter of rounding.)
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
    "norm_type": ("ada_norm_zero",),
}


def block_numbers(state: Mapping[str, Tensor], where: str = "") -> list[int]:
    """Numbers of the blocks of a state dict in the published layout; they must be 0, 1, 2, ..."""
    numbers = sorted(
        {int(match[1]) for name in state if (match := _BLOCK.fullmatch(name)) and len(match[1]) < 5}
    )
    if not numbers or numbers != list(range(len(numbers))):
        missing = next((i for i, number in enumerate(numbers) if i != number), len(numbers))
        raise CheckpointError(
            f"{where}{': ' if where else ''}not a DiT state dict: block {missing} is missing; "
            f"expected 'blocks.{missing}.attn.qkv.weight' and so on"
        )
    return numbers


def infer_config(state: Mapping[str, Tensor], *, num_heads: int | None, where: str) -> DiTConfig:
    """The configuration of a DiT from the shapes of its (possibly grafted) state dict in the published layout.

    The number of heads is not in the shapes: it is that of the published size with this width, else `num_heads`.
    Raises CheckpointError.
    """

    def shape(name: str, ndim: int) -> list[int]:
        if name not in state:
            raise CheckpointError(f"{where}: not a DiT state dict, tensor {name!r} is missing")
        found = list(state[name].shape)
        if len(found) != ndim or 0 in found:
            raise CheckpointError(f"{where}: tensor {name!r} has shape {found}, expected {ndim} dimensions")
        return found

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    depth = len(block_numbers(state, where))
    rows = shape("y_embedder.embedding_table.weight", 2)[0]
    out = shape("final_layer.linear.weight", 2)[0]
    tokens = shape("pos_embed", 3)[1]
    for name, position in (("pos_embed", 2), ("y_embedder.embedding_table.weight", 1)):
        other = state[name].shape[position]
        if other != width:
            raise CheckpointError(
                f"{where}: tensor 'x_embedder.proj.weight' is for width {width}, {name!r} for {other}"
            )
    side = round(tokens**0.5)
    if side * side != tokens:
        raise CheckpointError(
            f"{where}: 'pos_embed' has {tokens} tokens, not a square grid; only square latents are supported"
        )
    if out not in (patch**2 * channels, 2 * patch**2 * channels):
        raise CheckpointError(
            f"{where}: the final layer (final_layer.linear.weight) gives {out} values a token, "
            f"expected {patch**2 * channels} or {2 * patch**2 * channels} for patch {patch} and {channels} channels"
        )
    heads = num_heads or known_heads(width)
    if heads is None:
        raise CheckpointError(
            f"{where}: width {width} is not a published size, so the number of heads is unknown; give "
            "num_heads= (--num-heads)"
        )
    hidden = next(
        (
            state[name].shape[0]
            for name in (f"blocks.{i}.mlp.fc1.weight" for i in range(depth))
            if name in state and state[name].ndim == 2
        ),
        4 * width,
    )
    return DiTConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
        num_classes=rows - 1,
        learn_sigma=out == 2 * patch**2 * channels,
    )


def to_diffusers(state: Mapping[str, Tensor]) -> Tensors:
    """Published layout -> the state dict of diffusers' DiTTransformer2DModel."""
    depth = len(block_numbers(state))
    result: Tensors = {}
    for name, tensor in state.items():
        if name == "pos_embed":
            continue
        stem, kind = name.rsplit(".", 1)
        if stem in _EMBEDDERS:
            for layer in range(depth):
                result[f"transformer_blocks.{layer}.{_EMBEDDERS[stem]}.{kind}"] = tensor.clone()
        elif stem in _AT_ROOT:
            result[f"{_AT_ROOT[stem]}.{kind}"] = tensor
        elif (match := _BLOCK.fullmatch(stem)) and match[2] == "attn.qkv":
            for part, chunk in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                result[f"transformer_blocks.{match[1]}.attn1.{part}.{kind}"] = chunk.clone()
        elif match and match[2] in _IN_BLOCK:
            result[f"transformer_blocks.{match[1]}.{_IN_BLOCK[match[2]]}.{kind}"] = tensor
        else:
            raise CheckpointError(
                f"tensor {name!r} has no place in diffusers' DiT: only an unedited DiT can be converted"
            )
    return result


def from_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[DiTConfig, Tensors]:
    """diffusers' state dict and config.json -> configuration and state dict in the published layout.

    The embedders are those of block 0, which diffusers' final layer uses as well; the copies in the other blocks must
    be equal to them. Raises CheckpointError, also for settings that this DiT does not have.
    """
    _check_settings(config)
    blocks = {
        int(match[1]) for name in state if (match := _DIFFUSERS_BLOCK.fullmatch(name)) and len(match[1]) < 5
    }
    try:
        heads, head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        channels = int(config.get("in_channels", 4))
        dit = DiTConfig(
            input_size=int(config.get("sample_size", 32)),
            patch_size=int(config.get("patch_size", 2)),
            in_channels=channels,
            hidden_size=heads * head_dim,
            depth=int(config.get("num_layers", len(blocks))),
            num_heads=heads,
            num_classes=int(config.get("num_embeds_ada_norm", 1000)),
            learn_sigma=int(config.get("out_channels") or channels) == 2 * channels,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json does not describe a DiT: {type(error).__name__}: {error}"
        ) from None
    result: Tensors = {"pos_embed": sincos_2d(dit.hidden_size, dit.grid)}
    taken: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in state:
            raise CheckpointError(f"not diffusers' DiT: tensor {name!r} is missing")
        taken.add(name)
        return state[name]

    for kind in ("weight", "bias"):
        for ours, theirs in _AT_ROOT.items():
            result[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
        for ours, theirs in _EMBEDDERS.items():
            if not (ours == "y_embedder.embedding_table" and kind == "bias"):
                result[f"{ours}.{kind}"] = take(f"transformer_blocks.0.{theirs}.{kind}")
        for layer in range(dit.depth):
            prefix = f"transformer_blocks.{layer}."
            for ours, theirs in _IN_BLOCK.items():
                result[f"blocks.{layer}.{ours}.{kind}"] = take(f"{prefix}{theirs}.{kind}")
            qkv = [take(f"{prefix}attn1.{part}.{kind}") for part in ("to_q", "to_k", "to_v")]
            result[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(qkv)
        for layer in range(1, dit.depth):
            for ours, theirs in _EMBEDDERS.items():
                if f"{ours}.{kind}" in result:
                    copy = f"transformer_blocks.{layer}.{theirs}.{kind}"
                    _check_tied(result[f"{ours}.{kind}"], take(copy), copy)
    rest = [name for name in state if name not in taken]
    if rest:
        raise CheckpointError(f"not diffusers' DiT: unexpected tensor {rest[0]!r}")
    return dit, result


def _check_settings(config: Mapping[str, Any]) -> None:
    for key, known in _SETTINGS.items():
        if (value := config.get(key, known[0])) not in known:
            raise CheckpointError(
                f"config.json: {key} is {value!r}, which makes another model than this package's DiT; expected "
                f"{' or '.join(map(repr, known))}, as the published DiT has it"
            )


def _check_tied(first: Tensor, copy: Tensor, name: str) -> None:
    if first.shape != copy.shape or not torch.equal(first, copy):
        block = name.split(".")[1]
        raise CheckpointError(
            f"the timestep and label embedders of block {block} differ from those of block 0 (tensor {name!r}), and "
            "this package's DiT, like the published one, has one for all blocks; give a model whose copies are equal"
        )


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """Keyword arguments of diffusers' DiTTransformer2DModel; its `norm_eps` is set to the published value."""
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "attention_bias": True,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": config.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }

"""Family `dit`: the published class-conditional DiT (`grafting.models.dit`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grafting import operators
from grafting.errors import CheckpointError, GraftError
from grafting.families.base import SD_VAE, Family, Site, Tap
from grafting.formats import dit_states, weights
from grafting.models.dit import DiT, DiTConfig, named_config
from grafting.models.groups import BlockGroup
from grafting.operators import AttentionDonor, MLPDonor

_SEAMS = {"mha": "attn", "mlp": "mlp"}  # kind of site -> attribute of the block
_SPAN = re.compile(r"blocks\.(\d+)-(\d+)")
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(?:branches\.(\d+)\.)?(.+)")


class DiTFamily(Family):
    """Conditioning is a tensor of class numbers [B]; the null class is number `num_classes`."""

    name = "dit"
    names = "DiT-<S|B|L|XL>/<2|4|8>[-256|-512][-D<depth>]"
    vae = SD_VAE

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, DiT)

    def sites(self, model: nn.Module) -> list[Site]:
        return [
            _site(model, f"{path}.{attribute}", kind, layer, getattr(block, attribute))
            for path, layer, block in _plain_blocks(model)
            for kind, attribute in _SEAMS.items()
        ]

    def num_layers(self, model: nn.Module) -> int:
        return _config(model).depth

    def block_paths(self, model: nn.Module) -> list[str]:
        return [f"blocks.{number}" for number in range(len(_blocks(model)))]

    def layout(self, model: nn.Module) -> tuple[tuple[int, ...], ...]:
        return model.layout  # type: ignore[return-value]

    def set_blocks(
        self, model: nn.Module, blocks: Sequence[nn.Module], layout: tuple[tuple[int, ...], ...]
    ) -> None:
        model.blocks = nn.ModuleList(blocks).train(model.training)
        model.layout = tuple(tuple(layers) for layers in layout)  # type: ignore[assignment]

    def span(self, model: nn.Module, layers: Sequence[int]) -> Site:
        present = [*zip(self.layout(model), _blocks(model), strict=True)]
        donor = nn.ModuleList(block for held, block in present if set(held) & set(layers))
        path = f"blocks.{layers[0]}-{layers[-1]}"
        return _site(model, path, "block_group", layers[0], donor, tuple(layers))

    def group_sites(self, model: nn.Module) -> list[Site]:
        return [
            _site(model, f"blocks.{number}", "block_group", block.layers[0], block, block.layers)
            for number, block in enumerate(_blocks(model))
            if isinstance(block, BlockGroup)
        ]

    def teacher_name(self, model: nn.Module, name: str) -> str:
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            return name
        block, branch, rest = match.groups()
        layers = self.layout(model)[int(block)]
        if branch is None:
            return f"blocks.{layers[0]}.{rest}" if len(layers) == 1 else name
        return f"blocks.{layers[int(branch)]}.{rest}"

    def donor_weights(self, site: Site) -> AttentionDonor | MLPDonor | None:
        operator = getattr(site.donor, "operator_name", None)
        if operator == "mha":
            qkv, proj = site.donor.qkv, site.donor.proj
            q, k, v = qkv.weight.chunk(3)  # type: ignore[union-attr, operator]
            q_bias, k_bias, v_bias = qkv.bias.chunk(3)  # type: ignore[union-attr, operator]
            return AttentionDonor(
                q_weight=q, k_weight=k, v_weight=v, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias,
                out_weight=proj.weight, out_bias=proj.bias, num_heads=site.num_heads,  # type: ignore[union-attr, arg-type]
            )  # fmt: skip
        if operator == "mlp":
            fc1, fc2 = site.donor.fc1, site.donor.fc2
            return MLPDonor(
                in_weight=fc1.weight, in_bias=fc1.bias, out_weight=fc2.weight, out_bias=fc2.bias  # type: ignore[union-attr, arg-type]
            )  # fmt: skip
        return None

    def queries_and_keys(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(site.donor, "operator_name", None) != "mha":
            raise GraftError(
                f"{site}: its operator is no attention over all tokens, so it has no attention map"
            )
        projected: Tensor = site.donor.qkv(x)  # type: ignore[operator] # called, for it may have an adapter
        q, k, _ = operators.attention.split_heads(projected, site.num_heads)
        return q, k

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return model(x, t, cond)

    def predict_guided(self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, scale: float) -> Tensor:
        self._check_null(model)
        return super().predict_guided(model, x, t, cond, scale)

    def taps(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, paths: Collection[str]
    ) -> dict[str, Tap]:
        wanted = set(paths)
        found: dict[str, Tap] = {}
        spans = {path: (int(m[1]), int(m[2])) for path in wanted if (m := _SPAN.fullmatch(path))}
        operators_at = {int(path.split(".")[1]) for path in wanted if path not in spans}
        entered: dict[int, Tensor] = {}  # first block of a span -> its input
        with torch.no_grad():
            h, c = _enter(model, x, t, cond)
            for number, (block, layers) in enumerate(zip(_blocks(model), self.layout(model), strict=True)):
                if len(found) == len(wanted):
                    break
                entered[layers[0]] = h
                seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
                h = block(h, c, seen) if number in operators_at else block(h, c)
                for attribute, values in seen.items():
                    if (path := f"blocks.{number}.{attribute}") in wanted:
                        found[path] = Tap(*values)
                for path, (first, last) in spans.items():
                    if last == layers[-1]:
                        found[path] = Tap(entered[first], h, None, c)
                for layer in [
                    n for n in entered if not any(a == n and b > layers[-1] for a, b in spans.values())
                ]:
                    del entered[layer]
        return found

    def predict_with_features(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        h, c = _enter(model, x, t, cond)
        features = {}
        for layer, block in zip(self.feature_layers(model), _blocks(model), strict=True):
            h = block(h, c)
            if layer in layers:
                features[layer] = h
        return model.unpatchify(model.final_layer(h, c)), features  # type: ignore[operator]

    def ends(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule("x_embedder"), model.get_submodule("final_layer")]

    def sample_shape(self, model: nn.Module) -> tuple[int, int, int]:
        config = _config(model)
        return config.in_channels, config.input_size, config.input_size

    def num_classes(self, model: nn.Module) -> int | None:
        return _config(model).num_classes

    def guided_channels(self, model: nn.Module) -> int:
        """The published DiT guides three channels, whatever their number."""
        return min(3, _config(model).in_channels)

    def null_condition(self, model: nn.Module, cond: Any) -> Tensor:
        self._check_null(model)
        return torch.full_like(cond, _config(model).num_classes)

    def join_conditions(self, first: Any, second: Any) -> Tensor:
        return torch.cat([first, second])

    def flops_per_image(self, model: nn.Module) -> float:
        config = _config(model)
        tokens, width, out = config.num_tokens, config.hidden_size, config.patch_size**2
        embed = 2.0 * tokens * width * out * config.in_channels
        conditioning = 2.0 * (256 * width + width * width)
        head = (
            2.0 * tokens * width * out * (2 if config.learn_sigma else 1) * config.in_channels
            + 4.0 * width**2
        )
        blocks = sum(operators.cost_of(block, num_tokens=tokens, dim=width).total for block in _blocks(model))
        return embed + conditioning + head + blocks

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {"family": self.name, **_config(model).to_dict()}

    def build(self, architecture: dict[str, Any]) -> DiT:
        fields = {key: value for key, value in architecture.items() if key != "family"}
        try:
            return DiT(DiTConfig(**fields))
        except TypeError as error:
            raise CheckpointError(f"not the architecture of a DiT: {str(error)[:200]}") from None

    def lora_names(self) -> tuple[str, ...]:
        return ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

    def named(self, name: str) -> dict[str, Any] | None:
        try:
            return {"family": self.name, **named_config(name).to_dict()}
        except GraftError:
            return None

    def reads(self, config: Mapping[str, Any]) -> bool:
        named, norm = config.get("_class_name"), config.get("norm_type", "ada_norm_zero")
        return named == "DiTTransformer2DModel" or (named == "Transformer2DModel" and norm == "ada_norm_zero")

    def from_diffusers(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> DiT:
        try:
            dit, published = dit_states.from_diffusers(dict(tensors), dict(config))
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        model = DiT(dit)
        weights.load_strictly(model, {name: tensor.float() for name, tensor in published.items()}, where)
        return model

    def _check_null(self, model: nn.Module) -> None:
        if not _config(model).null_class:
            raise CheckpointError(
                "this model has no null class, so guidance is undefined for it; sample with guidance 1"
            )


def _config(model: nn.Module) -> DiTConfig:
    config = model.config
    assert isinstance(config, DiTConfig)  # owns() holds
    return config


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.blocks)  # type: ignore[arg-type]


def _plain_blocks(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(path, number in the unedited model, block) of every block, those in groups one by one."""
    for number, (block, layers) in enumerate(zip(_blocks(model), model.layout, strict=True)):  # type: ignore[arg-type]
        if isinstance(block, BlockGroup):
            for branch, layer in enumerate(layers):
                yield f"blocks.{number}.branches.{branch}", layer, block.branch(branch)
        else:
            yield f"blocks.{number}", layers[0], block


def _site(
    model: nn.Module, path: str, kind: str, layer: int, donor: nn.Module, layers: tuple[int, ...] = ()
) -> Site:
    config = _config(model)
    return Site(
        path=path, kind=kind, layer=layer, donor=donor, num_tokens=config.num_tokens, grid=config.grid,
        width=config.hidden_size, num_heads=config.num_heads, layers=layers,
    )  # fmt: skip


def _enter(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] and conditioning [B, D] at the entrance of block 0."""
    return model.x_embedder(x) + model.pos_embed, model.conditioning(t, y)  # type: ignore[operator]

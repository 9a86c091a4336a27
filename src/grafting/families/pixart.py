"""Family `pixart`: diffusers' PixArtTransformer2DModel, PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (2403.04692).

Axes: B batch, C channels, H W latent height and width, N tokens, D width, T text tokens, E width of the text encoder.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grafting import conditioning
from grafting.conditioning import Caption
from grafting.errors import CheckpointError, DataError, GraftError
from grafting.families import hosts
from grafting.families.base import Family, Site, Tap
from grafting.models.precision import calls_unrounded
from grafting.operators import AttentionDonor, MLPDonor

CAPTION_TOKENS = 300  # of PixArt-Sigma; what FLOPs are counted with (PixArt-alpha has 120)
VAE_FACTOR = 8  # pixels per latent, for the micro-conditions of PixArt-alpha at 1024
_SEAMS = {"mha": "attn1", "mlp": "ff"}  # kind of site -> attribute of the block
_GATES = {"attn1": 2, "ff": 5}  # its row among shift, scale, gate of both
_SIZE = "graft_latent_size"
# pixels -> latent side and interpolation of the position table (the published conversion script)
_SIGMA = {"256": (32, 0.5), "512": (64, 1), "1024": (128, 2), "2K": (256, 4)}
_ALPHA = {"256": (32, 1), "512": (64, 1), "1024": (128, 2)}
_NAME = re.compile(r"PixArt-(?:(?P<sigma>Sigma)-(?P<size>256|512|1024|2K)|Alpha-(?P<alpha>256|512|1024))"
                   r"(?:@(?P<height>\d+)x(?P<width>\d+))?")  # fmt: skip


class PixArtFamily(Family):
    """Conditioning is a `Caption`; its null condition is the encoded empty caption that comes with it."""

    name = "pixart"
    names = "PixArt-Sigma-<256|512|1024|2K> or PixArt-Alpha-<256|512|1024>, [@<height>x<width> in pixels]"

    def owns(self, model: nn.Module) -> bool:
        return any(cls.__name__ == "PixArtTransformer2DModel" for cls in type(model).__mro__)

    def sites(self, model: nn.Module) -> list[Site]:
        rows, columns = _grid(model)
        found = []
        for layer, block in enumerate(_blocks(model)):
            for kind, attribute in _SEAMS.items():
                donor, cost = getattr(block, attribute), None
                if hosts.is_attention(donor):
                    cost = hosts.attention_cost(donor, rows * columns, _config(model).num_attention_heads)
                elif hosts.is_feed_forward(donor):
                    cost = hosts.mlp_cost(donor, rows * columns)
                found.append(Site(
                    path=f"transformer_blocks.{layer}.{attribute}", kind=kind, layer=layer, donor=donor,
                    num_tokens=rows * columns, grid=(rows, columns), width=_width(model),
                    num_heads=_config(model).num_attention_heads,
                    host_operator=kind if cost is not None else None, host_cost=cost,
                ))  # fmt: skip
        return found

    def num_layers(self, model: nn.Module) -> int:
        return len(_blocks(model))

    def block_paths(self, model: nn.Module) -> list[str]:
        return [f"transformer_blocks.{layer}" for layer in range(self.num_layers(model))]

    def donor_weights(self, site: Site) -> AttentionDonor | MLPDonor | None:
        if hosts.is_attention(site.donor):
            return hosts.attention_donor(site.donor, site.num_heads)
        return hosts.mlp_donor(site.donor) if hosts.is_feed_forward(site.donor) else None

    def queries_and_keys(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        if not hosts.is_attention(site.donor):
            raise GraftError(
                f"{site}: its operator is no attention over all tokens, so it has no attention map"
            )
        return hosts.queries_and_keys(site.donor, x)

    def adapt(self, site: Site, operator: nn.Module) -> nn.Module:
        return hosts.take_host_call(operator)

    def predict(self, model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        with calls_unrounded(self.ends(model), x.device):
            return model(
                x.to(_dtype(model)), encoder_hidden_states=cond.embeds.to(_dtype(model)), timestep=t,
                encoder_attention_mask=cond.mask, added_cond_kwargs=_micro_conditions(model, x), return_dict=False,
            )[0]  # fmt: skip

    def predict_guided(self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, scale: float) -> Tensor:
        """As diffusers' pipeline: the empty caption first in the doubled batch; all noise channels are guided."""
        dtype = _dtype(model)  # before they are joined: autocast on CPUs joins no float16
        cond = cond._replace(embeds=cond.embeds.to(dtype), null_embeds=cond.null_embeds.to(dtype))
        both = conditioning.join(self.null_condition(model, cond), cond)
        unconditional, conditional = self.predict(model, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        channels = x.shape[1]
        step = conditional[:, :channels] - unconditional[:, :channels]
        return torch.cat([unconditional[:, :channels] + scale * step, conditional[:, channels:]], dim=1)

    def taps(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, paths: Collection[str]
    ) -> dict[str, Tap]:
        by_layer: dict[int, list[str]] = {}
        for path in paths:
            by_layer.setdefault(int(path.split(".")[1]), []).append(path)
        found = {}
        with torch.no_grad():
            flow = _Flow(model, x, t, cond)
            for layer in range(max(by_layer, default=-1) + 1):
                wanted = by_layer.get(layer, [])
                with hosts.recorded({path: model.get_submodule(path) for path in wanted}) as seen:
                    flow.step(layer)
                for path, (tokens, output) in seen.items():
                    found[path] = Tap(tokens, output, flow.gate(layer, _GATES[path.split(".")[2]]))
        return found

    def predict_with_features(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        flow, features = _Flow(model, x, t, cond), {}
        for layer in range(self.num_layers(model)):
            h = flow.step(layer)
            if layer in layers:
                features[layer] = h
        return flow.output(), features

    def sample_shape(self, model: nn.Module) -> tuple[int, int, int]:
        return (_config(model).in_channels, *_latent_size(model))

    def ends(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule("pos_embed"), model.get_submodule("proj_out")]

    def compilable(self, model: nn.Module, *, tapped: bool = False) -> list[nn.Module]:
        """All blocks; none where taps are taken: they hang on hooks, which a compiled block does not see."""
        return [] if tapped else super().compilable(model)

    def resized(self, model: nn.Module, height: int, width: int) -> nn.Module:
        if (height, width) == _latent_size(model):
            return model
        patch = _config(model).patch_size
        if height < 1 or width < 1 or height % patch or width % patch:
            raise DataError(
                f"latents of {height}x{width} do not fit patches of {patch}x{patch}; "
                "give sizes that are multiples of the patch"
            )
        view = copy.copy(model)
        object.__setattr__(view, _SIZE, (height, width))
        return view

    def check_data(
        self, model: nn.Module, name: str, shape: tuple[int, int, int], num_classes: int, caption_width: int
    ) -> None:
        channels, patch = _config(model).in_channels, _config(model).patch_size
        if shape[0] != channels or shape[1] % patch or shape[2] % patch:
            raise DataError(
                f"data '{name}' has latents of shape {list(shape)}; the model takes {channels} channels and sides that "
                f"are multiples of {patch}; make them with this model's own pipeline (graft synthesize)"
            )
        expected = _config(model).caption_channels or _config(model).cross_attention_dim
        if caption_width != expected:
            given = f"captions of width {caption_width}" if caption_width else "class labels, no captions"
            raise DataError(
                f"data '{name}' has {given}; the model takes captions of width {expected}; "
                "encode them with its own text encoder (graft synthesize)"
            )

    def num_classes(self, model: nn.Module) -> int | None:
        return None

    def example_condition(self, model: nn.Module, batch_size: int) -> Caption:
        like = _any_parameter(model)
        width = _config(model).caption_channels or _config(model).cross_attention_dim
        embeds = torch.zeros(batch_size, CAPTION_TOKENS, width, device=like.device, dtype=like.dtype)
        mask = torch.ones(batch_size, CAPTION_TOKENS, device=like.device, dtype=torch.int64)
        return Caption(embeds, mask, embeds, mask)

    def lora_names(self) -> tuple[str, ...]:
        return ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def set_checkpointing(self, model: nn.Module, on: bool) -> None:
        host: Any = model
        host.enable_gradient_checkpointing() if on else host.disable_gradient_checkpointing()

    def null_condition(self, model: nn.Module, cond: Any) -> Caption:
        return cond.null

    def join_conditions(self, first: Any, second: Any) -> Any:
        return conditioning.join(first, second)

    def flops_per_image(self, model: nn.Module) -> float:
        """With CAPTION_TOKENS text tokens."""
        config, width, text = _config(model), _width(model), CAPTION_TOKENS
        rows, columns = _grid(model)
        tokens, patch = rows * columns, config.patch_size**2
        embed = 2.0 * tokens * width * patch * config.in_channels
        head = 2.0 * tokens * width * patch * model.out_channels
        conditioner = 2.0 * (256 * width + 7 * width**2)
        captions = 2.0 * text * ((config.caption_channels or 0) * width + width**2)
        cross = 4.0 * (
            tokens * width**2 + text * (config.cross_attention_dim or 0) * width + tokens * text * width
        )
        return (
            embed + head + conditioner + captions + cross * self.num_layers(model)
            + sum(site.cost.total for site in self.sites(model))
        )  # fmt: skip

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        fields = {key: value for key, value in dict(model.config).items() if key in _fields()}  # type: ignore[arg-type]
        size = getattr(model, _SIZE, None)
        return {"family": self.name, **fields, **({"latent_size": list(size)} if size else {})}

    def build(self, architecture: Mapping[str, Any]) -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        fields = {key: value for key, value in architecture.items() if key not in ("family", "latent_size")}
        try:
            model: Any = PixArtTransformer2DModel(**fields)
            size = architecture.get("latent_size")
            return self.resized(model, *map(int, size)) if size else model
        except (TypeError, ValueError, NotImplementedError) as error:
            if isinstance(error, GraftError):
                raise
            raise CheckpointError(f"not the architecture of a PixArt: {error}") from None

    def named(self, name: str) -> dict[str, Any] | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        side, interpolation = _SIGMA[match["size"]] if match["sigma"] else _ALPHA[match["alpha"]]
        architecture: dict[str, Any] = {
            "family": self.name, "sample_size": side, "interpolation_scale": interpolation, "caption_channels": 4096,
            "use_additional_conditions": not match["sigma"] and side == 128,
        }  # fmt: skip
        if match["height"]:
            height, width = int(match["height"]), int(match["width"])
            if not height or not width or height % (2 * VAE_FACTOR) or width % (2 * VAE_FACTOR):
                raise GraftError(f"arch:{name}: height and width are multiples of {2 * VAE_FACTOR} pixels")
            architecture["latent_size"] = [height // VAE_FACTOR, width // VAE_FACTOR]
        return architecture

    def reads(self, config: Mapping[str, Any]) -> bool:
        kind = config.get("_class_name")
        legacy = kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single"
        return legacy or kind == "PixArtTransformer2DModel"

    def from_diffusers(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
    ) -> nn.Module:
        from accelerate import init_empty_weights

        from grafting.formats import weights

        with init_empty_weights(include_buffers=False):  # all its weights come from the file
            model = self.build({key: value for key, value in config.items() if key in _fields()})
        weights.load_strictly(model, {k: v.float() for k, v in tensors.items()}, where, assign=True)
        return model.eval()


class _Flow:
    """One forward pass, block by block, as PixArtTransformer2DModel.forward does it."""

    def __init__(self, model: Any, x: Tensor, t: Tensor, cond: Caption) -> None:
        self.model = model
        x, embeds = x.to(_dtype(model)), cond.embeds.to(_dtype(model))
        self.size = x.shape[-2:]
        with calls_unrounded([model.pos_embed], x.device):
            self.h: Tensor = model.pos_embed(x)  # [B, N, D]
        self.modulation, self.embedded_t = model.adaln_single(
            t, _micro_conditions(model, x), batch_size=len(x), hidden_dtype=self.h.dtype
        )  # [B, 6D], [B, D]
        if model.caption_projection is not None:
            embeds = model.caption_projection(embeds).view(len(x), -1, self.h.shape[-1])
        self.captions = embeds  # [B, T, D]
        self.mask = ((1 - cond.mask.to(x.dtype)) * -10000.0).unsqueeze(1)  # [B, 1, T], added to the scores

    def step(self, layer: int) -> Tensor:
        """The output [B, N, D] of the next block."""
        block = self.model.transformer_blocks[layer]
        given = (self.h, None, self.captions, self.mask, self.modulation, None, None)
        if torch.is_grad_enabled() and self.model.gradient_checkpointing:
            self.h = self.model._gradient_checkpointing_func(block, *given)
        else:
            self.h = block(*given)
        return self.h

    def gate(self, layer: int, row: int) -> Tensor:
        """[B, 1, D]: the gate of an operator of a block, from its table and the timestep (adaLN-single)."""
        table = self.model.transformer_blocks[layer].scale_shift_table  # [6, D]
        return (table[None] + self.modulation.reshape(len(self.modulation), 6, -1))[:, row : row + 1]

    def output(self) -> Tensor:
        """[B, 2C, H, W]."""
        model, patch = self.model, self.model.config.patch_size
        shift, scale = (model.scale_shift_table[None] + self.embedded_t[:, None]).chunk(2, dim=1)
        with calls_unrounded([model.proj_out], self.h.device):
            h = model.proj_out(model.norm_out(self.h) * (1 + scale) + shift)  # [B, N, P * P * 2C]
        rows, columns = self.size[0] // patch, self.size[1] // patch
        h = h.reshape(-1, rows, columns, patch, patch, model.out_channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(-1, model.out_channels, *self.size)


def _config(model: nn.Module) -> Any:
    return model.config


def _blocks(model: nn.Module) -> Any:
    return model.transformer_blocks


def _width(model: nn.Module) -> int:
    return _config(model).num_attention_heads * _config(model).attention_head_dim


def _any_parameter(model: nn.Module) -> Tensor:
    return model.pos_embed.proj.weight  # type: ignore[union-attr, return-value]


def _dtype(model: nn.Module) -> torch.dtype:
    return _any_parameter(model).dtype


def _latent_size(model: nn.Module) -> tuple[int, int]:
    side = _config(model).sample_size
    return getattr(model, _SIZE, (side, side))


def _grid(model: nn.Module) -> tuple[int, int]:
    height, width = _latent_size(model)
    return height // _config(model).patch_size, width // _config(model).patch_size


def _micro_conditions(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Size and aspect ratio of the image: an input of PixArt-alpha at 1024 only."""
    if not model.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    height, width = x.shape[-2:]
    size = torch.tensor([[height * VAE_FACTOR, width * VAE_FACTOR]], device=x.device)
    ratio = torch.tensor([[height / width]], device=x.device)
    return {
        "resolution": size.to(_dtype(model)).repeat(len(x), 1),
        "aspect_ratio": ratio.to(_dtype(model)).repeat(len(x), 1),
    }


def _fields() -> set[str]:
    from diffusers import PixArtTransformer2DModel

    return set(inspect.signature(PixArtTransformer2DModel.__init__).parameters) - {"self"}

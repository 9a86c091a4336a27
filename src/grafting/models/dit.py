"""The published DiT ("Scalable Diffusion Models with Transformers", arXiv 2212.09748), with its state-dict names.

Axes: B batch, C channels, H W latent height and width, P patch size, N tokens = (H/P)(W/P) in raster order, D width.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grafting import operators
from grafting.errors import GraftError
from grafting.models.precision import unrounded
from grafting.operators import Cost

_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}  # depth, width, heads
_NAME = re.compile(
    r"DiT-(?P<size>S|B|L|XL)/(?P<patch>2|4|8)(?:-(?P<pixels>256|512))?(?:-D(?P<depth>[1-9]\d{0,2}))?"
)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a class-conditional DiT. `input_size` is the side of the (square) latent; `depth` counts blocks."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            limit = 4097 if field == "depth" else 2**20
            if field in ("null_class", "learn_sigma"):
                continue
            if isinstance(value, bool) or not 0 < value < limit:
                raise GraftError(
                    f"DiT: {field}={value!r} is out of range; it is a positive number below {limit}"
                )
            if field != "mlp_ratio" and not isinstance(value, int):
                raise GraftError(f"DiT: {field}={value!r}: expected a whole number")
        if self.hidden_size % self.num_heads:
            raise GraftError(
                f"DiT: width {self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "give a number of heads that divides the width"
            )
        if self.hidden_size % 4:
            raise GraftError(
                f"DiT: width {self.hidden_size} is not a multiple of 4, which the 2-D position table needs"
            )
        if self.input_size % self.patch_size:
            raise GraftError(
                f"DiT: input_size {self.input_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.num_tokens * self.hidden_size > 2**27:
            raise GraftError(
                f"DiT: {self.num_tokens} tokens of width {self.hidden_size} make a position table of more than "
                f"{2**27} values; give a smaller input_size or a larger patch_size"
            )

    @property
    def grid(self) -> tuple[int, int]:
        side = self.input_size // self.patch_size
        return side, side

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def named_config(name: str) -> DiTConfig:
    """'DiT-XL/2', 'DiT-B/4-512' (pixels; the latent is 1/8), 'DiT-XL/2-D14' (another depth) -> its configuration."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise GraftError(
            f"unknown architecture {name!r}: expected DiT-<S|B|L|XL>/<2|4|8>[-256|-512][-D<depth>], "
            "such as DiT-XL/2 or DiT-XL/2-512 or DiT-XL/2-D14"
        )
    depth, width, heads = _SIZES[match["size"]]
    config = DiTConfig(
        input_size=int(match["pixels"] or 256) // 8,
        patch_size=int(match["patch"]),
        hidden_size=width,
        depth=depth,
        num_heads=heads,
    )
    return replace(config, depth=int(match["depth"])) if match["depth"] else config


def known_heads(width: int) -> int | None:
    """Number of heads of the published size with this width, if there is one."""
    return next((heads for _, size_width, heads in _SIZES.values() if size_width == width), None)


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed position table [1, N, D]: half of D for the column, half for the row, each half sines then cosines."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    omega = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    parts = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1) * omega  # [N, D/4]
        parts += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float().unsqueeze(0)


def timestep_features(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[B] timesteps -> [B, dim]: cosines then sines at `dim // 2` geometric frequencies."""
    half = dim // 2
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = t[:, None].float() * frequency  # [B, dim/2]
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, N, D] with shift and scale [B, D]."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class TimestepEmbedder(nn.Module):
    """[B] timesteps -> [B, D]."""

    def __init__(self, width: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.frequency_dim)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """[B] class numbers -> [B, D]; number `num_classes` is the null class of classifier-free guidance."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        # On the meta device even drawing nothing loads PyTorch's compiler, which takes seconds.
        self.embedding_table = (
            nn.Embedding.from_pretrained(torch.empty(num_rows, width), freeze=False)
            if torch.get_default_device().type == "meta"
            else nn.Embedding(num_rows, width)
        )

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, N, D]."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Latents stay in float32 whatever the weights are: a chain in bf16 would lose them.
        with unrounded(x.device):
            return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class DiTBlock(nn.Module):
    """adaLN-Zero block; `attn` and `mlp` are the two seams where operators are swapped."""

    stackable = True

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.width = width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = operators.build(
            "mha", dim=width, num_heads=config.num_heads, num_tokens=config.num_tokens
        )
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = operators.build("mlp", dim=width, num_tokens=config.num_tokens, ratio=config.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, c: Tensor, taps: dict[str, tuple[Tensor, Tensor, Tensor]] | None = None
    ) -> Tensor:
        """x [B, N, D], c [B, D] -> [B, N, D]. `taps` collects (input, output, gate [B, 1, D]) of both operators."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(
            6, dim=1
        )  # [B, D] each
        h = modulate(self.norm1(x), shift_a, scale_a)
        a = self.attn(h)
        x = torch.addcmul(x, gate_a.unsqueeze(1), a)
        g = modulate(self.norm2(x), shift_m, scale_m)
        m = self.mlp(g)
        if taps is not None:
            taps["attn"] = (h, a, gate_a.unsqueeze(1))
            taps["mlp"] = (g, m, gate_m.unsqueeze(1))
        return torch.addcmul(x, gate_m.unsqueeze(1), m)

    def cost(self, num_tokens: int) -> Cost:
        """Cost for one sample: both operators, and the projection of the conditioning (as featurizer)."""
        width = self.width
        operator, mlp = (
            operators.cost_of(m, num_tokens=num_tokens, dim=width) for m in (self.attn, self.mlp)
        )
        projection = sum(p.numel() for p in self.adaLN_modulation.parameters())
        return operator + mlp + Cost(0.0, 12.0 * width**2, projection)


class FinalLayer(nn.Module):
    """[B, N, D] -> [B, N, P * P * C_out]."""

    def __init__(self, config: DiTConfig, out_channels: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, config.patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        dtype = self.linear.weight.dtype
        with unrounded(x.device):
            shift, scale = self.adaLN_modulation(c.to(dtype)).chunk(2, dim=1)
            return self.linear(modulate(self.norm_final(x.to(dtype)), shift, scale))


class DiT(nn.Module):
    """Class-conditional diffusion transformer: model(x [B, C, H, W], t [B], y [B]) -> [B, 2C, H, W]."""

    pos_embed: nn.Parameter

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes + config.null_class, config.hidden_size)
        device = torch.get_default_device()
        table = (
            torch.empty(1, config.num_tokens, config.hidden_size, device=device)
            if device.type == "meta"
            else sincos_2d(config.hidden_size, config.grid).to(device)
        )
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        # Which blocks of the unedited model each of `blocks` holds: surgery may group blocks or drop some.
        self.layout = tuple((layer,) for layer in range(config.depth))
        self.final_layer = FinalLayer(config, self.out_channels)
        if device.type != "meta":
            self._initialize()

    def _initialize(self) -> None:
        """adaLN-Zero: every block starts as the identity and the output at zero (section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for name, weight in self.named_parameters():
            if name.endswith("embedding_table.weight") or (
                name.startswith("t_embedder") and weight.ndim == 2
            ):
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("adaLN_modulation.1.weight") or name == "final_layer.linear.weight":
                nn.init.zeros_(weight)

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """[B] timesteps and [B] classes -> [B, D]."""
        return self.t_embedder(t) + self.y_embedder(y)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, P * P * C] -> [B, C, H, W]."""
        (rows, columns), p = self.config.grid, self.config.patch_size
        x = x.reshape(len(x), rows, columns, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, rows * p, columns * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise prediction and, with learned variance, its interpolation coefficients: [B, 2C, H, W]."""
        h = self.x_embedder(x) + self.pos_embed  # [B, N, D]
        c = self.conditioning(t, y)  # [B, D]
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guidance on the doubled batch (conditional half first): acts on the first min(3, C) noise channels only."""
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        guided = min(3, self.config.in_channels)
        conditional, unconditional = output[:, :guided].chunk(2)
        mixed = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([mixed, mixed]), output[:, guided:]], dim=1)

"""What a family of host models tells the rest of the package; one subclass per architecture, one file each.

Axes: B batch, C channels, H W height and width, N tokens, D width.
"""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grafting import operators
from grafting.errors import DataError, GraftError, PlanError
from grafting.operators import AttentionDonor, Cost, MLPDonor
from grafting.plugins import load_plugins

SD_VAE = "stabilityai/sd-vae-ft-ema"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One seam of a model where an operator sits and may be replaced."""

    path: str  # of the module in the model, such as "blocks.3.attn"; of a run of blocks "blocks.2-3"
    kind: str  # "mha" or "mlp"; "block_group" for blocks in sequence or side by side
    layer: int  # the teacher's block number; of a group the first
    donor: nn.Module  # the operator there now
    num_tokens: int
    grid: tuple[int, int]
    width: int
    num_heads: int
    layers: tuple[int, ...] = ()  # of a group: all of its blocks
    # Of a host's own module, which knows nothing of this package; an operator says both itself.
    host_operator: str | None = None
    host_cost: Cost | None = None

    @property
    def operator(self) -> str:
        """The registered name of the operator there now, or its class for one that has none."""
        named = getattr(self.donor, "operator_name", None) or self.host_operator
        return named or type(self.donor).__name__

    @property
    def cost(self) -> Cost:
        """What the operator there now costs for one sample."""
        if self.host_cost is not None:
            return self.host_cost
        return operators.cost_of(self.donor, num_tokens=self.num_tokens, dim=self.width)

    def __str__(self) -> str:
        if self.layers:
            return f"layers {self.layers[0]}-{self.layers[-1]} ({self.kind}, {self.path})"
        return f"layer {self.layer} ({self.kind}, {self.path})"


class Tap(NamedTuple):
    """What an operator saw and made in one forward pass of its model."""

    input: Tensor  # [B, N, D]
    output: Tensor  # [B, N, D], before the gate
    gate: Tensor | None  # [B, 1, D]
    cond: Tensor | None = None  # of a group of blocks: the conditioning they are called with


class Family(ABC):
    """The adapter of one family. Stateless: every method takes the model."""

    name: str
    names: str  # of its architectures, for people: what `named` knows
    vae: str | None = None  # hub id of the VAE of its latents, where a model's pipeline says none

    @abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Whether `model` is of this family."""

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """All replaceable sites in block order, as they are now."""

    @abstractmethod
    def num_layers(self, model: nn.Module) -> int:
        """Number of blocks of the unedited model."""

    @abstractmethod
    def block_paths(self, model: nn.Module) -> list[str]:
        """Module path of every block, as they are now."""

    def layout(self, model: nn.Module) -> tuple[tuple[int, ...], ...]:
        """Which blocks of the unedited model each present block holds: one, or those of a group."""
        return tuple((layer,) for layer in range(self.num_layers(model)))

    def set_blocks(
        self, model: nn.Module, blocks: Sequence[nn.Module], layout: tuple[tuple[int, ...], ...]
    ) -> None:
        """Give the model other blocks, in place. Raises PlanError for a family whose depth can't be edited."""
        raise PlanError(f"the family '{self.name}' can't parallelize or prune blocks; use replace entries")

    def span(self, model: nn.Module, layers: Sequence[int]) -> Site:
        """These consecutive blocks of the unedited model as one site, for `taps`."""
        raise PlanError(f"the family '{self.name}' has no groups of blocks")

    def group_sites(self, model: nn.Module) -> list[Site]:
        """The groups of blocks that an edit put into the model."""
        return []

    def teacher_name(self, model: nn.Module, name: str) -> str:
        """The name that a tensor of the state dict has in the unedited model, if it is there at all."""
        return name

    def feature_layers(self, model: nn.Module) -> tuple[int, ...]:
        """Per present block, the last block of the unedited model that it stands for.

        A group stands for all of its blocks; a block before pruned ones stands for these too, since what it makes is
        what the next block gets.
        """
        starts = [layers[0] for layers in self.layout(model)][1:]
        return (*(start - 1 for start in starts), self.num_layers(model) - 1)

    @abstractmethod
    def donor_weights(self, site: Site) -> AttentionDonor | MLPDonor | None:
        """The donor's weights in neutral form, or None if it is not of a form that can be copied from."""

    def adapt(self, site: Site, operator: nn.Module) -> nn.Module:
        """`operator` as the host can call it at `site`: same state dict, in place; most hosts need nothing."""
        return operator

    @abstractmethod
    def predict(self, model: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Raw prediction for x [B, C, H, W], noised by `diffusion.add_noise` to t [B] (int64, 0..999).

        [B, C, H, W]: the noise; [B, 2C, H, W]: then the coefficients of a learned variance, which `ddpm` needs.
        A model of another process converts here (CONTRIBUTING.md has flow matching).
        """

    @abstractmethod
    def taps(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, paths: Collection[str]
    ) -> dict[str, Tap]:
        """One pass under no_grad that returns what the operators, or spans of blocks, at `paths` saw and made."""

    @abstractmethod
    def predict_with_features(
        self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The prediction and the outputs [B, N, D] of the blocks asked for, by `feature_layers`' numbers."""

    @abstractmethod
    def sample_shape(self, model: nn.Module) -> tuple[int, int, int]:
        """(C, H, W) of what the model denoises."""

    @abstractmethod
    def num_classes(self, model: nn.Module) -> int | None:
        """Number of classes of a class-conditional model (the null class not counted), else None."""

    def example_condition(self, model: nn.Module, batch_size: int) -> Any:
        """Some conditioning of that many samples on the model's device, for measurements: class 0 by default."""
        if self.num_classes(model) is None:
            raise GraftError(f"the family '{self.name}' gives no example of its conditioning to measure with")
        return torch.zeros(batch_size, dtype=torch.int64, device=next(model.parameters()).device)

    @abstractmethod
    def null_condition(self, model: nn.Module, cond: Any) -> Any:
        """The unconditional counterpart of `cond`, for guidance and label dropout."""

    @abstractmethod
    def join_conditions(self, first: Any, second: Any) -> Any:
        """Two conditionings as one doubled batch."""

    @abstractmethod
    def flops_per_image(self, model: nn.Module) -> float:
        """FLOPs of one forward pass of one sample, 2 per multiply-add."""

    @abstractmethod
    def architecture(self, model: nn.Module) -> dict[str, Any]:
        """JSON form from which `build` makes a model with random weights and no edits."""

    @abstractmethod
    def build(self, architecture: dict[str, Any]) -> nn.Module:
        """The inverse of `architecture`."""

    def queries_and_keys(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, N, D / H] of the attention at `site` on its input x [B, N, D].

        Scaled so that the attention map is softmax(q k^T / sqrt(D / H)). Raises GraftError if the family can't tell.
        """
        raise GraftError(
            f"{site}: the family '{self.name}' does not say what its queries and keys are, so attention can't be "
            f"measured; give {type(self).__name__} a method queries_and_keys"
        )

    def named(self, name: str) -> dict[str, Any] | None:
        """The architecture that `arch:<name>` stands for, or None for a name that is not of this family."""
        return None

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether `from_diffusers` takes a model that diffusers describes by this config.json."""
        return False

    def from_diffusers(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
    ) -> nn.Module:
        """The model that diffusers saved as this configuration and these tensors. Raises CheckpointError."""
        raise NotImplementedError

    def lora_names(self) -> tuple[str, ...]:
        """Names of the linear layers of a block that adapters go on by default: projections of attentions and MLPs."""
        return ()

    @property
    def has_checkpointing(self) -> bool:
        """Whether `set_checkpointing` can turn it on."""
        return type(self).set_checkpointing is not Family.set_checkpointing

    def set_checkpointing(self, model: nn.Module, on: bool) -> None:
        """Whether blocks are computed again in the backward pass instead of kept. Raises GraftError where it can't."""
        if on:
            raise GraftError(
                f"the family '{self.name}' has no gradient checkpointing; use a smaller micro_batch"
            )

    def ends(self, model: nn.Module) -> list[nn.Module]:
        """The first and the last layers, which compute in their weights' type under autocast (docs/precision.md)."""
        return []

    def compilable(self, model: nn.Module, *, tapped: bool = False) -> list[nn.Module]:
        """The modules that torch.compile may take one by one; `tapped`: also where `taps` is called."""
        return [model.get_submodule(path) for path in self.block_paths(model)]

    def resized(self, model: nn.Module, height: int, width: int) -> nn.Module:
        """The same model, weights shared, whose sites are for samples of another size, where it can take one."""
        expected = self.sample_shape(model)
        if (height, width) != expected[1:]:
            raise DataError(
                f"samples of {height}x{width}, the model takes {expected[1]}x{expected[2]} only; "
                "encode or resize the data for this model"
            )
        return model

    def check_data(
        self, model: nn.Module, name: str, shape: tuple[int, int, int], num_classes: int, caption_width: int
    ) -> None:
        """Raise DataError unless `model` can learn from data of this kind; `caption_width` is 0 without captions."""
        if tuple(shape) != tuple(self.sample_shape(model)):
            raise DataError(
                f"data '{name}' has samples of shape {list(shape)}, the model needs "
                f"{list(self.sample_shape(model))}; encode or resize the data for this model"
            )
        classes = self.num_classes(model)
        if classes is not None and caption_width:
            raise DataError(
                f"data '{name}' has captions, the model knows {classes} classes; give labelled data"
            )
        if classes is not None and num_classes > classes:
            raise DataError(
                f"data '{name}' has {num_classes} classes, the model knows {classes}; give data of its classes"
            )

    def guided_channels(self, model: nn.Module) -> int:
        """How many of the noise channels guidance acts on."""
        return self.sample_shape(model)[0]

    def predict_guided(self, model: nn.Module, x: Tensor, t: Tensor, cond: Any, scale: float) -> Tensor:
        """Classifier-free guidance in one doubled batch, as `predict` returns it; the variance unguided."""
        both = self.join_conditions(cond, self.null_condition(model, cond))
        output = self.predict(model, torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        guided = self.guided_channels(model)
        mixed = torch.lerp(unconditional[:, :guided], conditional[:, :guided], scale)
        return torch.cat([mixed, conditional[:, guided:]], dim=1)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known; a second registration under one name replaces the first only if it is the same class."""
    known = _FAMILIES.get(family.name)
    if known is not None and type(known) is not type(family):
        raise GraftError(f"a family named {family.name!r} is already registered by {type(known).__module__}")
    _FAMILIES[family.name] = family


def families() -> dict[str, Family]:
    """All registered families by name, those of plugins too."""
    load_plugins()
    return dict(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family that owns `model`, also when it is wrapped by a data-parallel or compiled module."""
    bare = unwrap(model)
    if (family := _owner(bare)) is not None:
        return family
    raise GraftError(
        f"no family knows a model of class {type(bare).__name__}: known are {', '.join(_FAMILIES)}; {_instead_of(bare)}"
    )


def _owner(model: nn.Module) -> Family | None:
    owner = next((family for family in _FAMILIES.values() if family.owns(model)), None)
    if owner is None:  # plugins are asked for only where nobody else knows the model
        owner = next((family for family in families().values() if family.owns(model)), None)
    return owner


def _instead_of(model: Any) -> str:
    """What to give instead of something that no family knows: mostly it holds, names or saves what one does."""
    if isinstance(model, (str, os.PathLike)):
        return "load it first: grafting.load_model"
    for inside in ("transformer", "module", "base_model.model"):
        try:
            found = operator.attrgetter(inside)(model)
        except AttributeError:
            continue
        if isinstance(found, nn.Module) and is_known(found):
            return f"give the model inside of it, its .{inside}"
    if type(model).__name__ == "DiTTransformer2DModel":
        return "save it with save_pretrained(folder) and give grafting.load_model(folder), which reads its layout"
    return "register one with grafting.families.register_family"


def is_known(model: nn.Module) -> bool:
    """Whether a registered family owns `model`."""
    return _owner(unwrap(model)) is not None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's and data parallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner

"""LoRA (arXiv 2106.09685) on what a graft left as it was, through PEFT: y = W x + (alpha / rank) B A x, with W fixed.

Adapters stay unmerged: a graft folder holds A and B beside the new operators, and the base's weights remain the base's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grafting import draws
from grafting.errors import CheckpointError, PlanError, RunError
from grafting.families import family_of
from grafting.selectors import closest
from grafting.surgery import edited_sites

_LORA = "graft_lora"
_ADAPTER = re.compile(r"\.(lora_[AB])\.default\.")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapters of a model: `targets` are the paths of the linear layers that have one."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Lora:
        """The inverse of `to_dict`. Raises CheckpointError."""
        targets = data.get("targets") if isinstance(data, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            targets = []
        if not targets or type(data.get("rank")) is not int or type(data.get("alpha")) not in (int, float):
            raise CheckpointError(f"{where}: key 'lora' needs a rank, an alpha and targets")
        return cls(rank=data["rank"], alpha=data["alpha"], targets=tuple(targets))


def lora_of(model: nn.Module) -> Lora | None:
    """The adapters that this model has, or None."""
    return getattr(model, _LORA, None)


def lora_targets(model: nn.Module, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Paths of the linear layers that LoRA goes on: those that end in one of `names`, by default the family's choice.

    Never inside of a new operator, which trains whole. Raises RunError for a name that matches nothing.
    """
    edited = tuple(f"{path}." for path in edited_sites(model))
    linear = [
        path for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(edited or ("\0",))
    ]  # fmt: skip
    wanted = names if names is not None else family_of(model).lora_names()
    found = []
    for name in wanted:
        matched = [path for path in linear if path == name or path.endswith(f".{name}")]
        if not matched and names is not None:
            ends = sorted({path.rpartition(".")[2] if not path[-1].isdigit() else ".".join(path.split(".")[-2:])
                           for path in linear})  # fmt: skip
            raise RunError(
                f"finetune: lora.targets: no linear layer outside of the new operators is called {name!r}"
                f"{closest(name, ends)}; there are {', '.join(ends[:20])}"
            )
        found += matched
    if not found:
        raise PlanError("finetune: lora: the plan left no layer for adapters; leave lora out")
    return tuple(sorted(set(found)))


def add_lora(model: nn.Module, lora: Lora, seed: int = 0) -> None:
    """Put adapters on linear layers of `model`, in place: A drawn from (seed, lora), B zero, so nothing changes yet.

    Raises RunError without PEFT, and for a model that has adapters already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise RunError("LoRA needs peft: pip install 'grafting[text]', or leave finetune.lora out") from None
    if lora_of(model) is not None:
        raise RunError("this model has LoRA adapters already; merge them first (grafting.lora.merge_lora)")
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none"  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.torch_seed(seed, "lora"))
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(plain_name(name), True))
    object.__setattr__(model, _LORA, lora)


def is_lora(name: str) -> bool:
    """Whether this is the name of an adapter's parameter."""
    return _ADAPTER.search(name) is not None


def plain_name(name: str) -> str:
    """A parameter's name as it was before adapters, or as an adapter's is stored: `....to_q.lora_A.weight`."""
    return _ADAPTER.sub(r".\1.", name.replace(".base_layer.", "."))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under plain names."""
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def module_state(model: nn.Module, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under plain names -> the state dict of `model`, whose names may have adapters in them."""
    own = {plain_name(name): name for name in model.state_dict()}
    return {own.get(name, name): tensor for name, tensor in plain.items()}


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of `model` with the adapters added into the weights that they sit on; `model` itself without any."""
    if lora_of(model) is None:
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for path, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            merged.set_submodule(path, module.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    object.__setattr__(merged, _LORA, None)
    return merged

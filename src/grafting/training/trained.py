"""What stage 2 trains: all weights, the edited blocks, the new operators, or adapters beside them."""

from __future__ import annotations

from torch import nn

from grafting.errors import PlanError, RunError
from grafting.families import Family
from grafting.lora import Lora, add_lora, lora_of, lora_targets
from grafting.surgery import edited_groups, edited_sites
from grafting.training.config import LoraConfig


def adapt(student: nn.Module, config: LoraConfig, seed: int) -> None:
    """Put the adapters of the settings on the student, unless it has the same already. Raises RunError."""
    present = lora_of(student)
    if present is None:
        targets = lora_targets(student, config.targets)
        add_lora(student, Lora(rank=config.rank, alpha=config.alpha, targets=targets), seed)
    elif (present.rank, present.alpha) != (config.rank, config.alpha):
        raise RunError(
            f"finetune: the student has LoRA adapters of rank {present.rank} and alpha {present.alpha:g} already; give "
            "the same, or merge them first (grafting.lora.merge_lora)"
        )


def trained_parameters(family: Family, student: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """Named parameters that stage 2 trains: all, those of the edited blocks, or those of the new operators.

    Parameters of operators with `train: false` and fixed tables are never among them. Raises PlanError.
    """
    sites, groups = edited_sites(student), edited_groups(student)
    kept = [path for path, (_, entry) in sites.items() if not entry.train]
    kept += [path for path, (_, entry) in groups.items() if not entry.train]
    fixed = tuple(f"{path}." for path in kept)
    parameters = {
        name: p
        for name, p in student.named_parameters()
        if p.requires_grad and not name.startswith(fixed or ("\0",))
    }
    if what == "all":
        return parameters
    if not sites and not groups:
        raise PlanError(
            f"train: {what} needs an edited model; this one has no replaced operators or groups of blocks"
        )
    prefixes = tuple(f"{path}." for path in (*sites, *groups))  # all of a group is new
    if what == "blocks":
        edited = {site.layer for site, _ in sites.values()}
        present = zip(family.block_paths(student), family.layout(student), strict=True)
        prefixes += tuple(f"{path}." for path, layers in present if edited & set(layers))
    return {name: p for name, p in parameters.items() if name.startswith(prefixes)}

"""Surgery on the depth of a model: blocks into groups that run side by side, and blocks that are dropped."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from grafting import draws
from grafting.explanation import GroupEdit, PruneEdit
from grafting.families import Family
from grafting.models.groups import BlockGroup
from grafting.operators import cost_of
from grafting.operators.base import linear
from grafting.plan import GraftPlan, Parallelize


def groups_of(family: Family, model: nn.Module) -> list[BlockGroup]:
    """The groups in a model, in order."""
    return [site.donor for site in family.group_sites(model) if isinstance(site.donor, BlockGroup)]


def in_sequence(family: Family, model: nn.Module) -> nn.Module:
    """The model, or where branches run as one a copy whose branches are modules of their own, called one by one."""
    if not any(group.is_stacked for group in groups_of(family, model)):
        return model
    apart = copy.deepcopy(model)
    for group in groups_of(family, apart):
        group.unstack()
    return apart


def open_groups(family: Family, model: nn.Module, layers: set[int]) -> list[BlockGroup]:
    """Put the branches of groups that hold one of these layers back into modules of their own; these groups."""
    found = [group for group in groups_of(family, model) if layers & set(group.layers)]
    for group in found:
        group.unstack()
    return found


def rearrange(family: Family, model: nn.Module, new: GraftPlan, everything: GraftPlan, seed: int) -> None:
    """Carry out the parallelize and prune entries of the resolved plan `new`, in place, and run like branches as one.

    everything: `new` and the plans of earlier grafts; its `train: false` operators keep their group in sequence.
    """
    fixed = {layer for (_, layer), entry in everything.sites.items() if not entry.train}
    entries, pruned = new.group_entries, set(new.pruned)
    if entries or pruned:
        first = {group[0]: (group, entry) for group, entry in entries.items()}
        inside = {layer for group in entries for layer in group}
        present = dict(zip(family.layout(model), _blocks(family, model), strict=True))
        blocks: list[nn.Module] = []
        layout: list[tuple[int, ...]] = []
        for layers, block in present.items():
            if layers[0] in first:
                group, entry = first[layers[0]]
                branches = [present[layer,] for layer in group]
                blocks.append(_group(family, model, branches, group, entry, seed))
                layout.append(group)
            elif not set(layers) & (inside | pruned):
                blocks.append(block)
                layout.append(layers)
        family.set_blocks(model, blocks, tuple(layout))
    for made in groups_of(family, model):
        trained = not fixed & set(made.layers)
        made.apart = None if trained else "an operator in it keeps its weights (train: false)"
        made.stack()


def _group(
    family: Family, model: nn.Module, branches: list[nn.Module], layers: tuple[int, ...], entry: Parallelize,
    seed: int,
) -> BlockGroup:  # fmt: skip
    site = family.span(model, layers)
    group = BlockGroup(branches, layers=layers, merge=entry.merge, width=site.width)
    if entry.init == "random":
        return randomly_merged(group, site.path, seed)
    group.set_naive_merge()
    return group


def randomly_merged(group: BlockGroup, path: str, seed: int) -> BlockGroup:
    """The same branches (not copies) under a merge drawn from (seed, path of the blocks in the unedited model)."""
    like = group.merge.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.torch_seed(seed, f"init/{path}"))
        merge = linear(group.merge.in_features, group.merge.out_features)
    return group.with_merge(merge.to(device=like.device, dtype=like.dtype))


def depth_edits(
    family: Family, teacher: nn.Module, student: nn.Module, plan: GraftPlan
) -> tuple[tuple[GroupEdit, ...], tuple[PruneEdit, ...]]:
    """What `plan` did to the depth of `teacher` to make `student` (on any device, meta too)."""
    made = {site.layers: site.donor for site in family.group_sites(student)}
    before = dict(zip(family.layout(teacher), _blocks(family, teacher), strict=True))
    paths = dict(zip(family.layout(teacher), family.block_paths(teacher), strict=True))
    groups = []
    for layers, entry in sorted(plan.group_entries.items()):
        site, group = family.span(teacher, layers), made[layers]
        assert isinstance(group, BlockGroup)
        size: dict[str, Any] = {"num_tokens": site.num_tokens, "dim": site.width}
        old, *others = [cost_of(group.branch(number), **size) for number in range(len(layers))]
        for other in others:
            old = old + other
        groups.append(
            GroupEdit(
                site=site, entry=entry, before=old, after=cost_of(group, **size), in_sequence=group.stack()
            )
        )
    pruned = []
    for layer in plan.pruned:
        site = family.span(teacher, (layer,))
        cost = cost_of(before[layer,], num_tokens=site.num_tokens, dim=site.width)
        pruned.append(PruneEdit(layer=layer, path=paths[layer,], before=cost))
    return tuple(groups), tuple(pruned)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy with all tensors on the meta device: the shape of a model, without its weights."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _blocks(family: Family, model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(path) for path in family.block_paths(model)]

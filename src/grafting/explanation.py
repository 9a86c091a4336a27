"""What a plan would do to a model, in numbers: per operator, per group of blocks, per pruned block, in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafting.families import Site
from grafting.operators import Cost, get, takes_donor
from grafting.plan import GraftPlan, Parallelize, Replace


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One site and what the plan puts there."""

    site: Site
    entry: Replace
    before: Cost
    after: Cost

    @property
    def start(self) -> str:
        """What it starts from: the plan's `init`, or "random" where the operator takes nothing from a donor."""
        return self.entry.init if takes_donor(get(self.entry.operator).cls) else "random"

    @property
    def old_operator(self) -> str:
        return self.site.operator

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "layer": self.site.layer, "target": self.site.kind, "path": self.site.path, "from": self.old_operator,
            "to": self.entry.operator, "config": self.entry.config.to_dict(), "init": self.start,
            **_costs(self.before, self.after),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GroupEdit:
    """Blocks in sequence that become branches side by side; costs count the operators that the plan puts in."""

    site: Site  # the blocks in the unedited model
    entry: Parallelize
    before: Cost
    after: Cost
    in_sequence: str | None  # why the branches can't run as one; None: they do

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        runs = f"in sequence, {self.in_sequence}" if self.in_sequence else "as one"
        return {
            "layer": self.site.layer, "layers": list(self.site.layers), "target": self.site.kind,
            "path": self.site.path, "from": f"{len(self.site.layers)} in sequence",
            "to": f"{len(self.site.layers)} side by side, run {runs}", "config": {"merge": self.entry.merge},
            "init": self.entry.init, "runs": runs,
            **_costs(self.before, self.after),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PruneEdit:
    """A block that is dropped."""

    layer: int
    path: str
    before: Cost

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "layer": self.layer, "target": "block", "path": self.path, "from": "block", "to": "nothing", "config": {},
            "init": "-", **_costs(self.before, Cost(0.0, 0.0, 0)),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a plan would do to a model, in numbers; nothing was changed to make it."""

    plan: GraftPlan
    edits: tuple[Edit, ...]
    groups: tuple[GroupEdit, ...] = ()
    pruned: tuple[PruneEdit, ...] = ()
    num_layers: int  # of the unedited model
    depth: tuple[int, int]  # blocks one after the other, before and after
    params: tuple[int, int]  # of the model before and after
    flops_per_image: tuple[float, float]  # likewise, 2 per multiply-add

    def __str__(self) -> str:
        rows = self.to_dict()["edits"]
        lines = [f"  layer {row['layer']} {row['target']}: {row['from']} -> {row['to']}, "
                 f"parameters {_change(row['params'])}, FLOPs {_change(row['flops'])}" for row in rows]  # fmt: skip
        whole = f"parameters {_change(self.params)}, FLOPs per image {_change(self.flops_per_image)}"
        depth = f", depth {self.depth[0]} -> {self.depth[1]}" if self.depth[0] != self.depth[1] else ""
        return "\n".join([f"{whole}{depth}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "plan": self.plan.to_dict(),
            "num_layers": self.num_layers,
            "model": {
                "params": list(self.params),
                "flops_per_image": list(self.flops_per_image),
                "depth": list(self.depth),
            },
            "edits": [
                *(edit.to_dict() for edit in self.edits),
                *(group.to_dict() for group in self.groups),
                *(block.to_dict() for block in self.pruned),
            ],
        }


def _change(values: Sequence[float]) -> str:
    before, after = values
    return f"{before:,.0f} -> {after:,.0f}" + (f" ({after / before - 1:+.1%})" if before else "")


def _costs(before: Cost, after: Cost) -> dict[str, list[float]]:
    return {
        "params": [before.params, after.params],
        "flops": [before.total, after.total],
        "operator_flops": [before.operator, after.operator],
        "featurizer_flops": [before.featurizer, after.featurizer],
    }

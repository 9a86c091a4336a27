"""What learns in stage 1: new operators and groups of blocks, each with its own lesson and bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from grafting.errors import PlanError
from grafting.families import Family, Site, Tap
from grafting.plan import Parallelize, Replace
from grafting.surgery import edited_groups, edited_sites
from grafting.training.config import DEFAULT_LOSSES, DistillConfig
from grafting.training.initialization import run_on

LOSSES = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "huber": lambda output, target: F.huber_loss(output, target, delta=1.0),
}


@dataclass
class Pupil:
    """One operator, or group of blocks, in training."""

    path: str  # of the donor in the teacher
    site: Site
    entry: Replace | Parallelize
    operator: nn.Module
    loss: str
    scaled: bool
    parameters: list[nn.Parameter]
    best: float = float("inf")
    best_step: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    rested_at: int | None = None  # 0: it has nothing to learn

    def __post_init__(self) -> None:
        if not self.parameters:
            self.rested_at = 0

    def gated(self, output: Tensor, tap: Tap) -> Tensor:
        """An output as the loss compares it: with `scaled`, times the block's gate."""
        return output * tap.gate if self.scaled and tap.gate is not None else output

    def loss_on(self, tap: Tap) -> Tensor:
        """The regression loss on one tap."""
        output, target = self.gated(run_on(self.operator, tap), tap), self.gated(tap.output, tap)
        return LOSSES[self.loss](output.float(), target.float())

    def note(self, step: int, error: float, config: DistillConfig) -> bool:
        """Keep the best weights by held-out error; whether the pupil, which no longer gains, rests from now on."""
        progress = error < self.best * (1 - config.early_stop_tolerance)
        if error < self.best:
            self.best, self.best_step = error, step
            if config.keep_best:
                self.best_state = {k: v.detach().clone() for k, v in self.operator.state_dict().items()}
        self.stale = 0 if progress else self.stale + 1
        if config.early_stop and self.stale >= config.early_stop and step < config.steps:
            self.rested_at = step
        return self.rested_at is not None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "state": self.operator.state_dict(), "best": self.best, "best_step": self.best_step,
            "best_state": self.best_state, "stale": self.stale, "rested_at": self.rested_at, "loss": self.loss,
        }  # fmt: skip

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `state`, of whose tensors none is kept."""
        self.operator.load_state_dict(saved["state"])
        self.best, self.best_step, self.stale = saved["best"], saved["best_step"], saved["stale"]
        self.best_state = {name: value.clone() for name, value in saved["best_state"].items()}
        self.rested_at, self.loss = saved["rested_at"], saved["loss"]


def pupils_of(family: Family, student: nn.Module, teacher: nn.Module, config: DistillConfig) -> list[Pupil]:
    """The operators that a plan put into `student`, then its groups of blocks; a weight has one owner."""
    losses = {str(target): loss for target, loss in (DEFAULT_LOSSES | config.losses).items()}
    sites, groups = edited_sites(student), edited_groups(student)
    donors = {(site.kind, site.layer): site.path for site in family.sites(teacher)}
    pupils = [
        Pupil(
            path=donors[site.kind, site.layer], site=site, entry=entry, operator=site.donor,
            loss=entry.loss or losses.get(entry.target, "l1"), scaled=entry.scale_by_gate,
            parameters=[p for p in site.donor.parameters() if p.requires_grad],
        )
        for site, entry in sites.values() if entry.train
    ]  # fmt: skip
    owned = {id(p) for site, _ in sites.values() for p in site.donor.parameters()}
    pupils += [
        Pupil(
            path=family.span(teacher, site.layers).path, site=site, entry=entry, operator=site.donor,
            loss=entry.loss or losses.get(site.kind, "l1"), scaled=False,
            parameters=[p for p in site.donor.parameters() if p.requires_grad and id(p) not in owned],
        )
        for site, entry in groups.values() if entry.train
    ]  # fmt: skip
    for pupil in pupils:
        own = list(pupil.operator.parameters())
        if own and not any(p.requires_grad for p in own):
            raise PlanError(
                f"{pupil.site}: the parameters of the new operator are frozen, and stage 1 trains them; call "
                "requires_grad_(True) on the student, or say train: false in the plan"
            )
    return pupils

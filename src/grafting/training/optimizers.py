"""The optimizers of both stages: AdamW, or Muon for the matrices of linear layers and AdamW for the rest.

Muon is orthogonalised momentum (`grafting.training.muon`); its step is scaled to the size of AdamW's, so that one
learning rate serves both. docs/studies says what was compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grafting.models.stacked import StackedLinear
from grafting.training.config import Optimization
from grafting.training.muon import Muon

MOMENTUM = 0.9


class BadSteps:
    """Steps with non-finite gradients, counted on the device: no step waits for the answer."""

    def __init__(self, device: torch.device, skipped: int = 0, in_a_row: int = 0) -> None:
        self._counts = torch.tensor([skipped, in_a_row, in_a_row], dtype=torch.float32, device=device)

    def note(self, norm: Tensor) -> Tensor:
        """Count a step by its gradient norm; 1.0 if it has to be skipped, else 0.0, on the device."""
        bad = (~torch.isfinite(norm)).float()
        skipped, in_a_row, longest = self._counts.unbind()
        skipped.add_(bad)
        in_a_row.add_(1.0).mul_(bad)
        torch.maximum(longest, in_a_row, out=longest)
        return bad

    @property
    def skipped(self) -> int:
        """All of them."""
        return int(self._counts[0])

    @property
    def in_a_row(self) -> int:
        """The last of them, up to the newest step."""
        return int(self._counts[1])

    @property
    def longest(self) -> int:
        """The most in a row."""
        return int(self._counts[2])


class Optimizers:
    """Several optimizers as one.

    slices: parameters [n, ...] and the n parameters, views of their rows, that the optimizers hold in their place.
    """

    def __init__(
        self,
        parts: Sequence[torch.optim.Optimizer],
        slices: Sequence[tuple[nn.Parameter, Sequence[nn.Parameter]]] = (),
    ) -> None:
        self.parts, self.slices = list(parts), list(slices)

    def step(self, skip: Tensor | None = None) -> None:
        """One step of each, unless `skip` (a scalar on the device) is 1: then nothing changes."""
        for whole, rows in self.slices:
            for number, row in enumerate(rows):
                row.grad = None if whole.grad is None else whole.grad[number]
        for part in self.parts:
            if skip is None:
                part.step()
            elif isinstance(part, torch.optim.AdamW):  # fused: it reads the scalar where it is
                part.found_inf = skip  # type: ignore[attr-defined]
                part.step()
                del part.found_inf  # type: ignore[attr-defined]
            elif not skip:
                part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad()
        for whole, _ in self.slices:
            whole.grad = None

    def set_learning_rate(self, lr: float) -> None:
        """The same learning rate for every group."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """State of all, in order."""
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, of which nothing is kept: PyTorch would keep what is on its device already."""
        for number, part in enumerate(self.parts):
            part.load_state_dict(state[str(number)])
            for entries in part.state.values():
                for name, value in entries.items():
                    if isinstance(value, Tensor) and value.device.type == "cpu":
                        entries[name] = value.clone()


def make_optimizer(
    model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], config: Optimization
) -> Optimizers:
    """The optimizer of `config` over groups of parameters of `model`."""
    linear = (
        {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, StackedLinear))}
        if config.optimizer == "muon"
        else set()
    )
    chosen = [p for group in groups for p in group if id(p) in linear]
    # A stacked linear layer is several matrices: each gets the step that it would get alone.
    slices = [(p, [nn.Parameter(row) for row in p.detach()]) for p in chosen if p.ndim == 3]
    matrices = [p for p in chosen if p.ndim == 2] + [row for _, rows in slices for row in rows]
    rest = [[p for p in group if id(p) not in linear] for group in groups]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            Muon(
                matrices, lr=config.lr, weight_decay=config.weight_decay, momentum=MOMENTUM,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    if any(rest):
        parts.append(
            torch.optim.AdamW(
                [{"params": group} for group in rest if group],
                lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True,
            )
        )  # fmt: skip
    return Optimizers(parts, slices)

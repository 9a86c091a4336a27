"""What an edit does to a model's prediction, before any of stage 2.

The objective `output` of stage 2 (arXiv 2202.00512's truncated SNR weights), measured instead of trained: the squared
difference of two models' raw predictions of the same noised data. Axes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grafting.analysis.observation import evaluating
from grafting.data import DataSource
from grafting.errors import GraftError
from grafting.families import family_of
from grafting.plan import GraftPlan
from grafting.surgery import graft, operator_name
from grafting.training.compute import Compute
from grafting.training.config import FinetuneConfig
from grafting.training.loop import Batches
from grafting.training.objectives import output_loss


class Damage:
    """Measures operators in the place of a model's own, all by the same samples, noise and timesteps.

    config: of stage 2, for its weights of timesteps and of the variance. at_once: samples of one pass of one process.
    Timesteps are spread evenly. The model is run in its own precision: autocast would round by more than a good edit
    does. Raises GraftError where a prediction is not finite.

    measure: everything that the figures depend on, but for the model and the operators, in JSON types.
    """

    def __init__(
        self, model: nn.Module, data: DataSource, config: FinetuneConfig, compute: Compute, *, num_samples: int,
        at_once: int, seed: int,
    ) -> None:  # fmt: skip
        self.family, self.config, self.compute, self.total = family_of(model), config, compute, num_samples
        self.model = graft(model, GraftPlan.empty(), share=True).eval()
        self.batches = Batches(
            data, self.family, self.model, seed=seed, purpose="search", label_dropout=config.label_dropout,
            device=compute.device, spread=True,
        )  # fmt: skip
        mine = torch.arange(num_samples)[compute.rank :: compute.world]
        self.parts = [
            part for part in mine.split(at_once) if len(part)
        ]  # none where there are more processes
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.measure: dict[str, Any] = {
            "data": data.content_hash, "num_samples": num_samples, "seed": seed, "dtype": self.dtype,
            **{name: getattr(config, name) for name in ("label_dropout", "output_snr_cap", "output_variance")},
        }  # fmt: skip
        self.targets = [self._predicted(part) for part in self.parts]  # [B, 2C or C, H, W] each
        if not all(torch.isfinite(target).all() for target in self.targets):
            raise GraftError(
                f"the model's own prediction is not finite in {self.dtype}; give --dtype float32 and another --out"
            )

    def of(self, operators: Mapping[str, nn.Module]) -> float:
        """The damage of these operators, by the paths of their sites, in the model together."""
        own = {path: self.model.get_submodule(path) for path in operators}
        try:
            for path, operator in operators.items():
                self.model.set_submodule(path, operator)
            damage = self._measure()
        finally:
            for path, operator in own.items():
                self.model.set_submodule(path, operator)
        if not math.isfinite(damage):
            raise GraftError(
                f"with {_named(operators)} the model's prediction is not finite in {self.dtype}; "
                "give --dtype float32 and another --out, or leave the candidate out there"
            )
        return damage

    def _measure(self) -> float:
        found = torch.zeros((), dtype=torch.float64)
        for part, target in zip(self.parts, self.targets, strict=True):
            batch = self.batches.at(part)
            loss = output_loss(
                self._predicted(part), target, batch.t, batch.x0.shape[1], self.config.output_snr_cap,
                self.config.output_variance,
            )  # fmt: skip
            found += len(part) / self.total * loss.double().cpu()
        return float(self.compute.sum(found))

    def _predicted(self, part: Tensor) -> Tensor:
        batch = self.batches.at(part)
        with evaluating(self.model):
            return self.family.predict(self.model, batch.x_t, batch.t, batch.cond)


def _named(operators: Mapping[str, nn.Module]) -> str:
    """The first of these operators, and how many others there are."""
    path, operator = next(iter(operators.items()))
    rest = f" and {len(operators) - 1} others" if len(operators) > 1 else ""
    return f"'{operator_name(operator)}' at {path}{rest}"


__all__ = ["Damage"]

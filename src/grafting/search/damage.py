"""What an edit does to a model's prediction, before any of stage 2.

The objective `output` of stage 2 (arXiv 2202.00512's truncated SNR weights), measured instead of trained: the squared
difference of two models' raw predictions of the same noised data. Axes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grafting.analysis.observation import evaluating
from grafting.data import DataSource
from grafting.families import family_of
from grafting.plan import GraftPlan
from grafting.surgery import graft
from grafting.training.compute import Compute
from grafting.training.config import FinetuneConfig
from grafting.training.loop import Batches
from grafting.training.objectives import output_loss


class Damage:
    """Measures operators in the place of a model's own, all by the same samples, noise and timesteps.

    config: of stage 2, for its weights of timesteps and of the variance. at_once: samples of one pass of one process.
    Timesteps are spread evenly. The model is run in its own precision: autocast would round by more than a good edit
    does.
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
        self.parts = torch.arange(num_samples)[compute.rank :: compute.world].split(at_once)
        self.targets = [self._predicted(part) for part in self.parts]  # [B, 2C or C, H, W] each

    def of(self, operators: Mapping[str, nn.Module]) -> float:
        """The damage of these operators, by the paths of their sites, in the model together."""
        own = {path: self.model.get_submodule(path) for path in operators}
        try:
            for path, operator in operators.items():
                self.model.set_submodule(path, operator)
            return self._measure()
        finally:
            for path, operator in own.items():
                self.model.set_submodule(path, operator)

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


__all__ = ["Damage"]

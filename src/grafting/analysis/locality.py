"""Locality: how much of its attention each layer keeps near the diagonal (arXiv 2506.05340, section 4).

Axes: L layers, H heads, T timestep bins, K band widths, B batch, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grafting import draws
from grafting.analysis.bands import band_mass, check_widths, default_width, uniform_mass
from grafting.analysis.observation import (
    Progress,
    bin_edges,
    bin_of,
    check_counts,
    check_finite,
    device_of,
    evaluating,
    inputs_seen,
)
from grafting.data import DataSource
from grafting.depth import in_sequence
from grafting.diffusion import sample
from grafting.errors import GraftError
from grafting.families import Family, Site, family_of
from grafting.operators import AttentionDonor
from grafting.runs import environment
from grafting.surgery import operator_name, source_of
from grafting.training.loop import Batches

VERSION = 1
TARGET = "mha"


def measure_locality(
    model: nn.Module,
    data: DataSource | None = None,
    *,
    widths: Sequence[int] | None = None,
    num_samples: int = 250,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    timestep_bins: int = 10,
    batch_size: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Band-k attention mass of every self-attention, as plain data; its `locality` feeds `top-local-50`.

    Without `data`, over the model's own sampling trajectories (default as in the paper: 50 `ddim` steps, guidance
    1.5), from the noise and labels that `graft sample` starts from; both halves of a guided batch count. With `data`,
    over that many of its samples, each noised to a uniform timestep; steps, sampler and guidance are then refused.
    widths: band widths k; the first gives `locality`. Default: N / 8.
    Sites whose operator is no longer an attention over all tokens are listed under `skipped`; their layers are None.
    Raises GraftError (settings, a family without queries_and_keys, no attention left), DataError (another model's).
    """
    check_counts(num_samples=num_samples, batch_size=batch_size)
    sampling = _Sampling.of(steps, sampler, guidance, data is not None)
    family = family_of(model)
    model = in_sequence(family, model)  # branches that run as one have no attention of their own to look at
    sites, skipped = _sites(family, model)
    num_tokens = sites[0].num_tokens
    if data is not None:  # a text-to-image model takes latents of other sizes than the one it was built for
        num_tokens = num_tokens * math.prod(data.shape[1:]) // math.prod(family.sample_shape(model)[1:])
    widths = [default_width(num_tokens)] if widths is None else list(widths)
    check_widths(widths, num_tokens)
    edges = bin_edges(timestep_bins)
    totals = _Totals(family, sites, widths, timestep_bins, num_tokens)
    device = device_of(model)
    with evaluating(model), inputs_seen({site.path: site.donor for site in sites}, totals.see):
        if data is None:
            protocol = _sampled(
                family, model, totals, sampling, num_samples, batch_size, seed, progress, device
            )
        else:
            protocol = _noised(family, model, totals, data, num_samples, batch_size, seed, progress, device)
    return {
        "version": VERSION,
        "model": source_of(model),
        "k": widths[0],
        "locality": totals.by_layer(widths[0], family.num_layers(model)),
        "num_tokens": num_tokens,
        "num_heads": sites[0].num_heads,
        "protocol": protocol,
        "timestep_bins": edges,
        "bands": [totals.band(k, family.num_layers(model)) for k in widths],
        "skipped": skipped,
        "environment": environment(),
    }


@dataclass(frozen=True)
class _Sampling:
    """The trajectories to measure along."""

    steps: int = 50
    sampler: str = "ddim"
    guidance: float = 1.5

    @classmethod
    def of(cls, steps: int | None, sampler: str | None, guidance: float | None, unused: bool) -> _Sampling:
        """The given settings over the defaults. Raises GraftError for one that would be ignored or is out of range."""
        settings = {"steps": steps, "sampler": sampler, "guidance": guidance}
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        if unused and given:
            raise GraftError(
                f"{next(iter(given))} belongs to sampling trajectories, but data was given to measure on; "
                "leave out the one or the other"
            )
        if guidance is not None and (not math.isfinite(guidance) or guidance < 0):
            raise GraftError(f"guidance={guidance}: expected a finite number of at least 0; 1 means none")
        return cls(**given)


def _sites(family: Family, model: nn.Module) -> tuple[list[Site], list[dict[str, Any]]]:
    """The attentions over all tokens, and a statement on every one that was replaced."""
    found, skipped = [], []
    for site in family.sites(model):
        if site.kind != TARGET:
            continue
        if isinstance(family.donor_weights(site), AttentionDonor):
            found.append(site)
        else:
            name = operator_name(site.donor)
            skipped.append({
                "layer": site.layer, "path": site.path, "operator": name,
                "reason": f"its operator is {name}, which has no attention map over all tokens",
            })  # fmt: skip
    if not found:
        raise GraftError(
            f"this model has no attention over all tokens left to measure ({len(skipped)} were replaced); "
            "measure the model that it was grafted from"
        )
    return found, skipped


class _Totals:
    """Sums of band mass per site, width, head and timestep bin, in float64 on the CPU."""

    def __init__(
        self, family: Family, sites: Sequence[Site], widths: Sequence[int], num_bins: int, num_tokens: int
    ) -> None:
        self.family, self.sites, self.widths = family, {site.path: site for site in sites}, list(widths)
        shape = (len(widths), num_bins, sites[0].num_heads)
        self.mass = {site.path: torch.zeros(shape, dtype=torch.float64) for site in sites}
        self.maps = {site.path: torch.zeros(num_bins, dtype=torch.float64) for site in sites}
        self.num_bins, self.num_tokens = num_bins, num_tokens
        self.t = torch.zeros(0, dtype=torch.int64)  # timesteps of the batch the model is at

    def see(self, path: str, x: Tensor) -> None:
        """Add the maps of one attention on its input x [B, N, D]; a guided batch holds every timestep twice."""
        check_finite(x, path)
        mass = band_mass(*self.family.queries_and_keys(self.sites[path], x), self.widths)  # [K, B, H]
        bins = bin_of(self.t.repeat(len(x) // len(self.t)), self.num_bins)
        self.mass[path].index_add_(1, bins, mass.cpu().double())
        self.maps[path].index_add_(0, bins, torch.ones(len(bins), dtype=torch.float64))

    def by_layer(self, width: int, num_layers: int) -> list[float | None]:
        """L_k per layer, None where nothing was measured."""
        place = self.widths.index(width)
        found: list[float | None] = [None] * num_layers
        for path, site in self.sites.items():
            found[site.layer] = (self.mass[path][place].sum(0) / self.maps[path].sum()).mean().item()
        return found

    def band(self, width: int, num_layers: int) -> dict[str, Any]:
        """One width: per layer, per layer and head, per layer and timestep bin (None: no sample fell into it)."""
        place = self.widths.index(width)
        heads: list[list[float] | None] = [None] * num_layers
        bins: list[list[float | None] | None] = [None] * num_layers
        for path, site in self.sites.items():
            mass, maps = self.mass[path][place], self.maps[path]  # [T, H], [T]
            heads[site.layer] = (mass.sum(0) / maps.sum()).tolist()
            bins[site.layer] = [
                (row.mean() / count).item() if count > 0 else None
                for row, count in zip(mass, maps, strict=True)
            ]
        return {
            "k": width, "uniform": uniform_mass(self.num_tokens, width), "layers": self.by_layer(width, num_layers),
            "heads": heads, "timesteps": bins,
        }  # fmt: skip


def _sampled(
    family: Family, model: nn.Module, totals: _Totals, sampling: _Sampling, num: int, batch_size: int, seed: int,
    progress: Progress | None, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Measure along sampling trajectories."""
    classes = family.num_classes(model)
    if classes is None:
        raise GraftError(
            "this model is not class-conditional, so there are no labels to sample it by; give data (--data) to "
            "measure on noised samples"
        )
    shape, steps = family.sample_shape(model), sampling.steps
    for chunk in torch.arange(num).split(batch_size):
        index = chunk.to(device)

        def at_step(step: int, timestep: int, chunk: Tensor = chunk) -> None:
            totals.t = torch.full((len(chunk),), timestep, dtype=torch.int64)
            if progress:
                progress(int(chunk[0]) * steps + (step + 1) * len(chunk), num * steps)

        sample(
            model, draws.normal(seed, "sample/start", index, shape), index % classes, steps=steps,
            sampler=sampling.sampler, guidance=sampling.guidance, on_step=at_step,
            step_noise=lambda step, i=index: draws.normal(seed, f"sample/step{step}", i, shape),  # type: ignore[misc]
        )  # fmt: skip
    return {
        "along": "sampling trajectories", "num_samples": num, "steps": steps,
        "sampler": sampling.sampler, "guidance": sampling.guidance, "labels": f"i mod {classes}", "seed": seed,
    }  # fmt: skip


def _noised(
    family: Family, model: nn.Module, totals: _Totals, data: DataSource, num: int, batch_size: int, seed: int,
    progress: Progress | None, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Measure on noised samples at uniform timesteps."""
    batches = Batches(data, family, model, seed=seed, purpose="locality", label_dropout=0.0, device=device)
    for chunk in torch.arange(num).split(batch_size):
        batch = batches.at(chunk)
        totals.t = batch.t.cpu()
        family.predict(model, batch.x_t, batch.t, batch.cond)
        if progress:
            progress(int(chunk[-1]) + 1, num)
    return {
        "along": "noised data", "num_samples": num, "data": data.name, "data_hash": data.content_hash,
        "timesteps": "uniform", "seed": seed,
    }  # fmt: skip

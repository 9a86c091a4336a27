"""What the operators of a model see and make, and which regression loss that asks for.

Axes: B batch, N tokens, D width, T timestep bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grafting.analysis.moments import describe
from grafting.analysis.observation import (
    Progress,
    bin_edges,
    bin_of,
    check_counts,
    check_finite,
    device_of,
    evaluating,
)
from grafting.analysis.regression import choose_loss, recommend
from grafting.data import DataSource
from grafting.families import Site, family_of
from grafting.runs import environment
from grafting.surgery import source_of
from grafting.training.loop import Batches

VERSION = 1
HELD_BYTES = 2 << 30  # of the inputs and outputs that are held at a time


def measure_activations(
    model: nn.Module,
    data: DataSource,
    *,
    num_samples: int = 256,
    timestep_bins: int = 10,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Statistics of inputs and outputs of every operator on noised data, and a stage-1 loss for each, as plain data.

    `num_samples` of `data`, each at a uniform timestep as in stage 1, pass through the model twice; outputs are taken
    before the gate. Where a batch's would take more than `HELD_BYTES`, batches are smaller, and where those of one
    sample would, the operators take turns, with two passes for each turn.

    `sites`: per operator `input` and `output` (keys: see `grafting.analysis.moments.describe`) and `loss`;
    `recommended`: per target the loss with its reason. Raises GraftError (settings, activations that are not finite),
    DataError (data of another model).
    """
    check_counts(num_samples=num_samples, batch_size=batch_size)
    edges = bin_edges(timestep_bins)
    family = family_of(model)
    sites = family.sites(model)
    device = device_of(model)
    batches = Batches(data, family, model, seed=seed, purpose="activations", label_dropout=0.0, device=device)
    larger = math.prod(data.shape[1:]) / math.prod(
        family.sample_shape(model)[1:]
    )  # than what it was built for
    itemsize = next(model.parameters()).element_size()
    sizes = [int(2 * site.num_tokens * larger * site.width * itemsize) for site in sites]
    size, turns = _in_turns(sites, sizes, batch_size)
    done = 0

    def passes(turn: Sequence[Site]) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        nonlocal done
        for chunk in torch.arange(num_samples).split(size):
            batch = batches.at(chunk)
            seen: dict[str, Tensor] = {}
            for path, tap in family.taps(
                model, batch.x_t, batch.t, batch.cond, [s.path for s in turn]
            ).items():
                check_finite(tap.output, path)
                seen[f"{path}/input"], seen[f"{path}/output"] = tap.input, tap.output
            yield bin_of(batch.t, timestep_bins), seen
            done += len(chunk)
            if progress:
                progress(done, 2 * num_samples * len(turns))

    found: dict[str, dict[str, Any]] = {}
    with evaluating(model):
        for turn in turns:
            found |= describe(partial(passes, turn), timestep_bins)
    rows: list[Mapping[str, Any]] = [
        {
            "layer": site.layer, "path": site.path, "target": site.kind, "operator": site.operator,
            "loss": choose_loss(found[f"{site.path}/output"]["median_efficiency"]),
            "input": found[f"{site.path}/input"], "output": found[f"{site.path}/output"],
        }
        for site in sites
    ]  # fmt: skip
    return {
        "version": VERSION,
        "model": source_of(model),
        "protocol": {
            "along": "noised data", "num_samples": num_samples, "data": data.name, "data_hash": data.content_hash,
            "timesteps": "uniform", "seed": seed,
        },
        "timestep_bins": edges,
        "recommended": recommend(rows),
        "sites": rows,
        "environment": environment(),
    }  # fmt: skip


def _in_turns(sites: Sequence[Site], sizes: Sequence[int], batch_size: int) -> tuple[int, list[list[Site]]]:
    """Samples at a time, and which sites together, so that inputs and outputs stay within `HELD_BYTES`.

    sizes: bytes of both at each site, of one sample. Fewer samples come first: they cost no further pass.
    """
    samples = min(batch_size, max(1, HELD_BYTES // sum(sizes)))
    turns: list[list[Site]] = []
    held = 0
    for site, size in zip(sites, sizes, strict=True):
        held += samples * size
        if not turns or held > HELD_BYTES:
            turns.append([])
            held = samples * size
        turns[-1].append(site)
    return samples, turns

"""What both stages share: sample order, draws, the learning-rate schedule, EMA, and the journal of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grafting import draws
from grafting.conditioning import choose, move
from grafting.data import DataSource
from grafting.diffusion import NUM_TIMESTEPS, add_noise
from grafting.errors import DataError, RunError
from grafting.families import Family, family_of
from grafting.training.compute import Compute
from grafting.training.config import Optimization

Never: Callable[[], int | None] = lambda: None  # noqa: E731


class Journal(Protocol):
    """Where a stage reports to and keeps its state. A run folder is one; `Quiet` keeps nothing.

    `save_checkpoint` is called from another thread, while training goes on, one call at a time; the state is its own.
    `load_checkpoint` gives the newest, on other processes than the first that of the step that the first one found.
    """

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether `save_checkpoint` does anything: otherwise no state is copied for it."""

    def log(self, record: Mapping[str, Any]) -> None: ...
    def progress(self, stage: str, step: int, total: int, text: str) -> None: ...
    def preview(self, stage: str, step: int, samples: Tensor) -> None: ...
    def save_checkpoint(self, stage: str, step: int, state: Mapping[str, Any], keep: int) -> None: ...
    def load_checkpoint(self, stage: str, step: int | None = None) -> dict[str, Any] | None: ...
    def stop_requested(self) -> int | None: ...
    def scratch(self) -> Path | None: ...


def what_helps(journal: Journal, step: int, config: Optimization, precision: str) -> str:
    """The end of an error that training diverged: what is kept, what to change."""
    kept = journal.keeps_checkpoints and step > config.checkpoint_every
    lower = f"lower lr (now {config.lr:g})" + ("" if precision == "fp32" else " or use precision fp32")
    return f"the last good checkpoint is kept; {lower}" if kept else lower


@dataclass
class Quiet:
    """A journal in memory, for library use."""

    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def keeps_checkpoints(self) -> bool:
        """Only in a subclass that does."""
        return type(self).save_checkpoint is not Quiet.save_checkpoint

    def log(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))

    def progress(self, stage: str, step: int, total: int, text: str) -> None:
        pass

    def preview(self, stage: str, step: int, samples: Tensor) -> None:
        pass

    def save_checkpoint(self, stage: str, step: int, state: Mapping[str, Any], keep: int) -> None:
        pass

    def load_checkpoint(self, stage: str, step: int | None = None) -> dict[str, Any] | None:
        return None

    def stop_requested(self) -> int | None:
        return None

    def scratch(self) -> Path | None:
        """A folder for what a stage stores while it runs; None: the system's temporary folder."""
        return None


@dataclass(frozen=True)
class Batch:
    """One batch of a stage: clean x0, noised x_t, timesteps, conditioning, noise; `index` are global sample numbers."""

    index: Tensor
    x0: Tensor
    x_t: Tensor
    t: Tensor
    cond: Any
    noise: Tensor


class Batches:
    """Batches as a function of (seed, purpose, step): data order, timesteps, noise and label dropout."""

    def __init__(
        self, data: DataSource, family: Family, model: nn.Module, *, seed: int, purpose: str,
        label_dropout: float, device: torch.device, spread: bool = False,
    ) -> None:  # fmt: skip
        family.check_data(model, data.name, data.shape, data.num_classes, getattr(data, "caption_width", 0))
        self.data, self.family, self.model = data, family, model
        self.seed, self.purpose, self.label_dropout, self.device = seed, purpose, label_dropout, device
        self._draw_timesteps = draws.spread_integers if spread else draws.integers
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, index: Tensor) -> Batch:
        """The batch of these global sample numbers [B]."""
        size = len(self.data)
        rows = torch.empty_like(index)
        for epoch in (index // size).unique().tolist():
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = draws.permutation(self.seed, f"{self.purpose}/order", epoch, size)
            chosen = index // size == epoch
            rows[chosen] = self._order[index[chosen] % size]
        x0, y = self.data.batch(rows)
        return self.noised(index, x0, y)

    def conditions(self, rows: Tensor) -> Any:
        """The conditioning of some samples, from the start again beyond the last."""
        return move(self.data.batch(rows % len(self.data))[1], self.device)

    def noised(self, index: Tensor, x0: Tensor, y: Any) -> Batch:
        """Draw timesteps, noise and label dropout for given samples."""
        x0, index, y = move((x0, index, y), self.device)
        t = self._draw_timesteps(self.seed, f"{self.purpose}/t", index, NUM_TIMESTEPS)
        noise = draws.normal(self.seed, f"{self.purpose}/noise", index, tuple(x0.shape[1:]))
        if self.label_dropout > 0:
            dropped = draws.uniform(self.seed, f"{self.purpose}/drop", index) < self.label_dropout
            y = choose(dropped, self.family.null_condition(self.model, y), y)
        return Batch(index=index, x0=x0, x_t=add_noise(x0, t, noise), t=t, cond=y, noise=noise)


def step_index(step: int, batch_size: int) -> Tensor:
    """Global sample numbers of one step."""
    return torch.arange(step * batch_size, (step + 1) * batch_size)


def agreed(compute: Compute, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses of this process's samples -> losses of the global batch, the same on all processes; shapes may differ."""
    if compute.world == 1 or not losses:
        return dict(losses)
    sizes = [value.numel() for value in losses.values()]
    flat = compute.sum(torch.cat([value.reshape(-1) for value in losses.values()])).split(sizes)
    return {name: flat[i].view_as(value) for i, (name, value) in enumerate(losses.items())}


def _fixed(batches: Batches, data: DataSource) -> Batches:
    return Batches(
        data, batches.family, batches.model, seed=batches.seed, purpose=f"{batches.purpose}/validation",
        label_dropout=batches.label_dropout, device=batches.device,
    )  # fmt: skip


def samples_per_pass(config: Optimization, processes: int = 1) -> int:
    """How many samples a process computes at once in a stage of these settings."""
    share = -(-config.batch_size // processes)
    return min(config.micro_batch or share, share)


def held_out(batches: Batches, data: DataSource, batch_size: int, at_once: int) -> list[list[Batch]]:
    """Fixed batches over a held-out set, in parts of `at_once`: its t, noise and labels never change."""
    fixed = _fixed(batches, data)
    return [
        [fixed.noised(part, *data.batch(part)) for part in rows.split(at_once)]
        for rows in torch.arange(len(data)).split(batch_size)
    ]


def held_out_shares(
    batches: Batches, data: DataSource, config: Optimization, compute: Compute
) -> list[tuple[Batch, bool]]:
    """This process's parts of every held-out batch, and whether they count (one that is empty repeats a sample)."""
    fixed = _fixed(batches, data)
    return [
        (fixed.noised(mine, *data.batch(mine)), weight > 0)
        for rows in torch.arange(len(data)).split(config.batch_size)
        for mine, weight in compute.parts(rows, config.micro_batch)
    ]


def load_checkpoint(journal: Journal, stage: str, compute: Compute) -> dict[str, Any] | None:
    """The newest checkpoint of a stage: the first process chooses and checks it, the others read the same one.

    Its tensors may be pages of a file: what is kept of them has to be copied. Raises RunError where a process does not
    have it.
    """
    state = journal.load_checkpoint(stage) if compute.is_main else None
    compute.wait()  # hashing it from a slow disk may outlast the patience of a message
    step = compute.from_main(None if state is None else state["step"])
    if compute.is_main or step is None:
        return state
    state = journal.load_checkpoint(stage, step)
    if state is None or state["step"] != step:
        raise RunError(
            f"process {compute.rank} does not find the {stage} checkpoint of step {step}, which the first process has; "
            "all machines need the same run folder, on a shared file system"
        )
    return state


def split(data: DataSource, num_validation: int, seed: int) -> tuple[DataSource, DataSource | None]:
    """Training and held-out part. Data too small for that many held-out samples gives a tenth of itself."""
    count = min(num_validation, len(data) // 10)
    if count < 1:
        return data, None
    train, validation = data.split(count, seed)
    return train, validation


def learning_rate(config: Optimization, step: int) -> float:
    """Linear warm-up, then constant, to zero by a cosine or a line, or halved at fractions of the run."""
    warmup = min(config.warmup, config.steps // 4)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "halving":
        return config.lr * 0.5 ** sum(step >= fraction * config.steps for fraction in config.halve_at)
    gone = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (1 - gone if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone)))


class EMA:
    """Exponential moving average of named parameters, with the usual warm-up of its decay.

    In float32 at least, whatever the parameters are: in bf16 an update of a thousandth would be rounded away.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {
            name: value.detach().clone().to(torch.promote_types(value.dtype, torch.float32))
            for name, value in parameters.items()
        }
        self._live: dict[str, Tensor] | None = None  # the parameters, while the average is in their place

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """After optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.values.values()), [parameters[k].to(v.dtype) for k, v in self.values.items()], 1 - decay
        )

    @torch.no_grad()
    def swap(self, parameters: Mapping[str, Tensor]) -> None:
        """Put the average in the place of the live parameters; called again, put those back."""
        live, self._live = self._live, None
        if live is None:
            live = self.values
            self._live = {name: parameters[name].detach().clone() for name in live}
        for name, value in live.items():
            parameters[name].copy_(value)


class Clock:
    """Seconds and a projection of what is left."""

    def __init__(self, done: int, total: int) -> None:
        self.first, self.total, self.started = done, total, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def eta(self, done: int) -> str:
        """Time left after `done` steps, as 1:05:09 or 3:07."""
        fresh = max(1, done - self.first)
        left = round(self.seconds / fresh * (self.total - done))
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def check_types(student: nn.Module, teacher: nn.Module, compute: Compute) -> None:
    """Raise DataError where the student's operators can't take what the teacher's give them."""
    mine, theirs = (next(model.parameters()).dtype for model in (student, teacher))
    if mine != theirs and compute.precision == "fp32":
        raise DataError(
            f"the student's weights are {mine}, the teacher's {theirs}: operators learn on what the teacher computes; "
            f"give both one type (student.to({theirs})), or precision: bf16"
        )


def family_and_model(student: nn.Module, teacher: nn.Module | None) -> Family:
    """The one family of both models. Raises DataError if it, or the shape they are built to, differs."""
    family = family_of(student)
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None and any(parameter.is_meta for parameter in model.parameters()):
            raise DataError(f"the {name} is on the meta device and has no values; load or build it with some")
    if teacher is None:
        return family
    if family_of(teacher) is not family:
        raise DataError("teacher and student are of different model families")
    mine, theirs = family.architecture(student), family.architecture(teacher)
    differing = [
        f"{key} {mine.get(key)} against {theirs.get(key)}" for key in mine if mine.get(key) != theirs.get(key)
    ]
    if differing:
        raise DataError(
            f"student and teacher are of different shapes ({', '.join(differing)}); give the teacher that was grafted"
        )
    return family

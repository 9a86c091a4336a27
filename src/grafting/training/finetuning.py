"""Stage 2, lightweight finetuning: the whole edited model, few steps, little data (arXiv 2506.05340, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grafting import draws
from grafting.data import DataSource
from grafting.diffusion import loss_from_output, sample
from grafting.errors import DivergedError, PlanError, RunError
from grafting.families import Family
from grafting.surgery import edited_groups, edited_sites
from grafting.training.compute import Compute, make_compute
from grafting.training.config import FinetuneConfig, settings
from grafting.training.loop import (
    EMA,
    Batches,
    Clock,
    Interrupted,
    Journal,
    Quiet,
    agreed,
    family_and_model,
    held_out,
    learning_rate,
    split,
    step_index,
)
from grafting.training.objectives import mixed_loss
from grafting.training.optimizers import Optimizers, make_optimizer

STAGE = "finetune"
_Losses = tuple[dict[str, Tensor], Tensor]  # of one step: the loss under "" and its terms; the gradient norm


@dataclass
class FinetuneResult:
    """What stage 2 did. `validation` is the held-out DiT loss of the averaged weights: step -> loss."""

    steps: int
    image_visits: int
    flops: float
    seconds: float
    trained_params: int
    ema_decay: float
    validation: dict[int, float]
    skipped_steps: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**vars(self), "validation": {str(step): loss for step, loss in self.validation.items()}}


def finetune(
    student: nn.Module,
    data: DataSource,
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    *,
    journal: Journal | None = None,
) -> FinetuneResult:
    """Finetune `student` in place; its weights at the end are the moving average.

    data: clean samples and labels. config: `FinetuneConfig` or its keys. teacher: needed by the objectives `output` and
    `features`. journal: a run folder that logs, checkpoints and resumes; default: nothing is kept.
    Raises RunError (objective without its teacher), PlanError (nothing to train), DataError, DivergedError.
    """
    config = settings(FinetuneConfig, config, "finetune")
    wanted = [name for name in ("output", "features") if config.objectives.get(name, 0) > 0]
    if wanted and teacher is None:
        raise RunError(f"finetune: objective '{wanted[0]}' matches the teacher; give teacher=")
    if wanted and teacher is student:
        raise RunError(
            "finetune: the teacher is the student itself; give the model that was grafted as teacher"
        )
    family = family_and_model(student, teacher)
    compute = make_compute(next(student.parameters()).device, config.precision)
    student.to(compute.device)
    if teacher is not None:
        teacher = teacher.to(compute.device).eval()
    return _Stage(family, student, teacher, data, config, compute, journal or Quiet()).run()


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


class _Stage:
    def __init__(
        self, family: Family, student: nn.Module, teacher: nn.Module | None, data: DataSource, config: FinetuneConfig,
        compute: Compute, journal: Journal,
    ) -> None:  # fmt: skip
        self.family, self.student, self.teacher = family, student, teacher
        self.config, self.compute, self.journal = config, compute, journal
        self.parameters = trained_parameters(family, student, config.train)
        if not self.parameters:
            raise PlanError("stage 2 has nothing to train: every operator of the plan says train: false")
        train, validation = split(data, config.num_validation, config.seed)
        if config.fraction < 1:  # of what is not held out: the same samples are held out at every fraction
            train = train.subset(config.fraction, config.seed)
        self.batches = Batches(
            train, family, student, seed=config.seed, purpose=STAGE,
            label_dropout=config.label_dropout, device=compute.device,
        )  # fmt: skip
        self.held_out = (
            held_out(self.batches, validation, config.batch_size) if validation is not None else []
        )
        self.layers = family.feature_layers(student)
        horizon = max(1.0, config.ema_horizon * config.steps)
        self.decay = config.ema_decay if config.ema_decay is not None else 1 - 1 / horizon

    def run(self) -> FinetuneResult:
        config, compute = self.config, self.compute
        frozen = [
            p
            for p in self.student.parameters()
            if p.requires_grad and not any(p is q for q in self.parameters.values())
        ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.student.train()
        try:
            return self._run(config, compute)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            self.student.eval()

    def _run(self, config: FinetuneConfig, compute: Compute) -> FinetuneResult:
        optimizer = make_optimizer(self.student, [list(self.parameters.values())], config)
        ema = EMA(self.parameters, self.decay)
        first, seconds, skipped, in_a_row = 0, 0.0, 0, 0
        validation: dict[int, float] = {}
        state = self.journal.load_checkpoint(STAGE)
        if state is not None:
            with torch.no_grad():
                for name, value in state["parameters"].items():
                    self.parameters[name].copy_(value)
            ema.values = {name: value.to(compute.device) for name, value in state["ema"].items()}
            optimizer.load_state_dict(state["optimizer"])
            first, seconds, skipped, in_a_row = (
                state["step"],
                state["seconds"],
                state["skipped"],
                state["in_a_row"],
            )
            validation = state["validation"]
        elif self.held_out:
            validation[0] = self._validate(ema)
            self.journal.log({"stage": STAGE, "step": 0, "event": "validation", "loss": validation[0]})
        clock = Clock(first, config.steps)
        window: list[_Losses] = [
            (
                {k: v.to(compute.device) * compute.is_main for k, v in losses.items()},  # they are summed
                norm.to(compute.device),
            )
            for losses, norm in (state["unlogged"] if state is not None else [])
        ]

        for step in range(first, config.steps):
            if (code := compute.agree_to_stop(self.journal.stop_requested())) is not None:
                self._checkpoint(
                    step, optimizer, ema, seconds + clock.seconds, validation, skipped, in_a_row,
                    [(agreed(compute, losses), norm) for losses, norm in window],
                )  # fmt: skip
                raise Interrupted(code, step)
            optimizer.set_learning_rate(learning_rate(config, step))
            losses, norm = self._backward(step)
            if torch.isfinite(norm):
                optimizer.step()
                ema.update(self.parameters, step)
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
            optimizer.zero_grad()
            window.append((losses, norm))
            done = step + 1
            if (
                in_a_row > config.max_bad_steps
                or done % config.log_every == 0
                or done % config.checkpoint_every == 0
                or done == config.steps
            ):
                self._log(done, window, clock, in_a_row > config.max_bad_steps)
                window = []
            if self.held_out and (done % config.validate_every == 0 or done == config.steps):
                validation[done] = self._validate(ema)
                self.journal.log(
                    {"stage": STAGE, "step": done, "event": "validation", "loss": validation[done]}
                )
            if config.preview_every and done % config.preview_every == 0 and compute.is_main:
                self.journal.preview(STAGE, done, self._preview(ema))
            if done % config.checkpoint_every == 0 or done == config.steps:
                self._checkpoint(done, optimizer, ema, seconds + clock.seconds, validation, skipped, in_a_row)

        ema.swap(self.parameters)
        visits = config.steps * config.batch_size
        return FinetuneResult(
            steps=config.steps,
            image_visits=visits,
            flops=self._flops(visits),
            seconds=seconds + clock.seconds,
            trained_params=sum(p.numel() for p in self.parameters.values()),
            ema_decay=self.decay,
            validation=validation,
            skipped_steps=skipped,
        )

    def _backward(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of one step in place; this process's part of the losses, and the gradient norm before clipping."""
        found: dict[str, Tensor] = {}
        for part, weight in self.compute.parts(
            step_index(step, self.config.batch_size), self.config.micro_batch
        ):
            batch = self.batches.at(part)
            with self.compute.autocast():
                loss, terms = mixed_loss(
                    self.family, self.student, self.teacher, batch, self.config, self.layers
                )
                loss = loss * weight
            loss.backward()
            for name, value in {"": loss.detach(), **{k: v * weight for k, v in terms.items()}}.items():
                found[name] = found.get(name, 0) + value
        parameters = list(self.parameters.values())
        self.compute.sum_gradients(parameters)
        return found, nn.utils.clip_grad_norm_(parameters, self.config.clip)

    def _log(self, step: int, window: list[_Losses], clock: Clock, bad: bool) -> None:
        names = list(window[0][0])
        rows = [torch.stack(list(losses.values())) for losses, _ in window]
        loss, *values = self.compute.sum(torch.stack(rows).mean(dim=0)).tolist()
        terms = dict(zip(names[1:], values, strict=True))
        norm = torch.stack([norm for _, norm in window]).max().item()
        if bad or loss != loss or loss in (float("inf"), float("-inf")):
            raise DivergedError(
                f"stage 2 diverged: loss {loss} and gradient norm {norm} at step {step}; the last good checkpoint is "
                f"kept; lower lr (now {self.config.lr:g}) or use precision fp32"
            )
        finite_norm = norm if norm == norm and norm != float("inf") else None
        self.journal.log({
            "stage": STAGE, "step": step, "lr": learning_rate(self.config, step - 1), "loss": loss, "terms": terms,
            "grad_norm": finite_norm,
        })  # fmt: skip
        rate = (step - clock.first) * self.config.batch_size / max(clock.seconds, 1e-9)
        self.journal.progress(
            STAGE, step, self.config.steps, f"loss {loss:.4f}, {rate:.0f} images/s, ETA {clock.eta(step)}"
        )

    @torch.no_grad()
    def _validate(self, ema: EMA) -> float:
        """Held-out DiT loss of the averaged weights."""
        ema.swap(self.parameters)
        self.student.eval()
        try:
            total, count = 0.0, 0
            for batch in self.held_out:
                with self.compute.autocast():
                    output = self.family.predict(self.student, batch.x_t, batch.t, batch.cond)
                total += loss_from_output(output, batch.x0, batch.t, batch.noise)["loss"].sum().item()
                count += len(batch.t)
            return total / count
        finally:
            ema.swap(self.parameters)
            self.student.train()

    def _preview(self, ema: EMA) -> Tensor:
        """A few quick samples [N, C, H, W] of the averaged weights, from the same noise every time."""
        index = torch.arange(self.config.preview_samples, device=self.compute.device)
        noise = draws.normal(self.config.seed, "preview", index, self.family.sample_shape(self.student))
        ema.swap(self.parameters)
        self.student.eval()
        try:
            with self.compute.autocast():
                return sample(
                    self.student, noise, index % (self.family.num_classes(self.student) or 1),
                    steps=10, sampler="dpm++", guidance=1.5,
                )  # fmt: skip
        finally:
            ema.swap(self.parameters)
            self.student.train()

    def _checkpoint(
        self, step: int, optimizer: Optimizers, ema: EMA, seconds: float, validation: dict[int, float],
        skipped: int, in_a_row: int, unlogged: list[_Losses] | None = None,
    ) -> None:  # fmt: skip
        if not self.compute.is_main:
            return
        self.journal.save_checkpoint(STAGE, step, {
            "step": step, "seconds": seconds, "validation": validation, "skipped": skipped, "in_a_row": in_a_row,
            "parameters": {name: p.detach() for name, p in self.parameters.items()}, "ema": ema.values,
            "optimizer": optimizer.state_dict(), "unlogged": list(unlogged or []),
        }, self.config.keep_checkpoints)  # fmt: skip

    def _flops(self, visits: int) -> float:
        """Three student passes (forward, backward twice) per visit, and one of the teacher where it is matched."""
        matches = any(self.config.objectives.get(name, 0) > 0 for name in ("output", "features"))
        teacher = self.family.flops_per_image(self.teacher) if matches and self.teacher is not None else 0.0
        return visits * (3 * self.family.flops_per_image(self.student) + teacher)

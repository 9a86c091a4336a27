"""Stage 2, lightweight finetuning: the whole edited model, few steps, little data (arXiv 2506.05340, section 3)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafting import draws
from grafting.data import DataSource, as_data
from grafting.diffusion import loss_from_output, sample
from grafting.errors import DivergedError, Interrupted, PlanError, RunError
from grafting.families import Family
from grafting.lora import is_lora
from grafting.training.acceleration import compiled, frozen_copy
from grafting.training.answers import answers_of
from grafting.training.compute import Compute, make_compute
from grafting.training.config import FinetuneConfig, settings
from grafting.training.loop import (
    EMA,
    Batch,
    Batches,
    Clock,
    Journal,
    Quiet,
    agreed,
    family_and_model,
    held_out_shares,
    learning_rate,
    load_checkpoint,
    samples_per_pass,
    split,
    step_index,
    what_helps,
)
from grafting.training.objectives import mixed_loss
from grafting.training.optimizers import BadSteps, Optimizers, make_optimizer
from grafting.training.results import FinetuneResult
from grafting.training.saving import CheckpointWriter
from grafting.training.sharding import hold, optimizer_state
from grafting.training.trained import adapt, trained_parameters

STAGE = "finetune"
_Losses = tuple[dict[str, Tensor], Tensor]  # of one step: the loss under "" and its terms; the gradient norm


@torch.inference_mode(False)  # it trains, whatever the mode around the call
def finetune(
    student: nn.Module,
    data: DataSource | Any,
    config: FinetuneConfig | Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    *,
    journal: Journal | None = None,
    answers: str | Path | None = None,
) -> FinetuneResult:
    """Finetune `student` in place; its weights at the end are the moving average.

    data: clean samples and labels, in any form that `grafting.data.as_data` takes. config: `FinetuneConfig` or its
    keys. teacher: needed by the objectives `output` and `features`.
    journal: a run folder that logs, checkpoints and resumes; default: nothing is kept.
    answers: a folder in which the teacher's predictions are kept, for other students that are finetuned on the same
    batches of the same teacher; for one process, and the objective `output` without `features`.
    Raises RunError (objective without its teacher), PlanError (nothing to train), DataError, DivergedError.
    """
    if isinstance(data, nn.Module):
        raise RunError(
            "finetune: a model was given as data; the order is finetune(student, data, config, teacher=...)"
        )
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
    if config.shard == "none" or compute.world == 1:
        student.to(compute.device)
    if config.lora is not None:
        adapt(student, config.lora, config.seed or 0)
    if teacher is not None:
        teacher = teacher.to(compute.device).eval()
    return _Stage(family, student, teacher, as_data(data), config, compute, journal or Quiet(), answers).run()


@dataclass
class _Course:
    """What changes from step to step; checkpoints hold it."""

    optimizer: Optimizers
    ema: EMA
    bad: BadSteps
    step: int = 0
    seconds: float = 0.0
    validation: dict[int, float] = field(default_factory=dict)
    window: list[_Losses] = field(default_factory=list)  # since the last line of the log


class _Stage:
    def __init__(
        self, family: Family, student: nn.Module, teacher: nn.Module | None, data: DataSource, config: FinetuneConfig,
        compute: Compute, journal: Journal, answers: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.family, self.student, self.teacher = family, student, teacher
        self.config, self.compute, self.journal = config, compute, journal
        self.writer = CheckpointWriter(journal, STAGE, config.keep_checkpoints)
        matches = any(config.objectives.get(name, 0) > 0 for name in ("output", "features"))
        self.reference = frozen_copy(teacher, compute) if matches and teacher is not None else None
        self.seed = config.seed or 0
        parameters = trained_parameters(
            family, student, "operators" if config.lora is not None else config.train
        )
        if config.lora is not None:
            parameters |= {name: p for name, p in student.named_parameters() if is_lora(name)}
        if teacher is not None and {id(p) for p in teacher.parameters()} & set(map(id, parameters.values())):
            raise RunError(
                "finetune: teacher and student share weights that would be trained; graft or load the student without "
                "share, or train: operators"
            )
        self.names = list(parameters)
        if not self.names:
            frozen = any(True for _ in student.parameters()) and not any(
                p.requires_grad for p in student.parameters()
            )
            raise PlanError(
                "stage 2 has nothing to train: "
                + (
                    "all parameters of the student are frozen; call student.requires_grad_(True)"
                    if frozen
                    else "every operator of the plan says train: false"
                )
            )
        train, validation = split(data, config.num_validation, self.seed)
        if config.fraction < 1:  # of what is not held out: the same samples are held out at every fraction
            train = train.subset(config.fraction, self.seed)
        self.batches = Batches(
            train, family, student, seed=self.seed, purpose=STAGE,
            label_dropout=config.label_dropout, device=compute.device, spread=config.timesteps == "spread",
        )  # fmt: skip
        self.held_out = (
            held_out_shares(self.batches, validation, config, compute) if validation is not None else []
        )
        self.answers = (
            answers_of(answers, teacher, data, config, compute) if answers and teacher is not None else None
        )
        self.layers = family.feature_layers(student)
        horizon = max(1.0, config.ema_horizon * config.steps)
        self.decay = config.ema_decay if config.ema_decay is not None else 1 - 1 / horizon

    def run(self) -> FinetuneResult:
        named = dict(self.student.named_parameters())
        frozen = [p for name, p in named.items() if p.requires_grad and name not in set(self.names)]
        for parameter in frozen:
            parameter.requires_grad_(False)
        if self.config.gradient_checkpointing:
            self.family.set_checkpointing(self.student, True)
        blocks = self.family.block_paths(self.student)
        self.held = hold(self.student, self.names, blocks, self.compute, self.config.shard, self.teacher)
        self.held.train(True)
        try:
            with self.writer, compiled(self._compilable(), self.config.compile, self.compute.device):
                return self._run(self.config, self.compute)
        finally:
            if self.config.gradient_checkpointing:
                self.family.set_checkpointing(self.student, False)
            for parameter in frozen:
                parameter.requires_grad_(True)
            self.student.eval()

    def _compilable(self) -> list[nn.Module]:
        """The blocks of student and teacher; of a sharded student none, they gather their weights as they run."""
        student = [] if self.held.takes_all else self.family.compilable(self.student)
        return student + ([] if self.reference is None else self.family.compilable(self.reference))

    def _run(self, config: FinetuneConfig, compute: Compute) -> FinetuneResult:
        course = self._begin()
        first, clock = course.step, Clock(course.step, config.steps)
        before = course.seconds
        for step in range(first, config.steps):
            if (code := compute.agree_to_stop(self.journal.stop_requested())) is not None:
                course.window = [(agreed(compute, losses), norm) for losses, norm in course.window]
                self._checkpoint(course)
                self.writer.wait()
                compute.wait()  # no process ends, and none is ended, before the file is there
                raise Interrupted(code, step)
            course.optimizer.set_learning_rate(learning_rate(config, step))
            losses, norm = self._backward(step)
            course.optimizer.step(course.bad.note(norm))
            course.ema.update(self.held.parameters, step)
            course.optimizer.zero_grad()
            self.held.clear_gradients()
            course.window.append((losses, norm))
            done = step + 1
            course.step, course.seconds = done, before + clock.seconds
            logs = done % config.log_every == 0 or done % config.checkpoint_every == 0 or done == config.steps
            if (
                logs or compute.device.type == "cpu"
            ):  # elsewhere a look at the counter would wait for the device
                too_many = course.bad.longest > config.max_bad_steps
                if logs or too_many:
                    self._log(course, clock, too_many)
                    course.window = []
            if self.held_out and (done % config.validate_every == 0 or done == config.steps):
                self._note_validation(course)
            if config.preview_every and done % config.preview_every == 0:
                self._preview(course)
                compute.wait()  # the first process may have drawn alone
            if done % config.checkpoint_every == 0 or done == config.steps:
                self._checkpoint(course)
                compute.wait()  # the first process may still have been writing the one before

        course.ema.swap(self.held.parameters)
        self.held.hand_back()
        visits = config.steps * config.batch_size
        named = dict(self.student.named_parameters())
        return FinetuneResult(
            steps=config.steps,
            image_visits=visits,
            flops=self._flops(visits),
            seconds=before + clock.seconds,
            trained_params=sum(named[name].numel() for name in self.names),
            ema_decay=self.decay,
            validation=course.validation,
            skipped_steps=course.bad.skipped,
        )

    def _begin(self) -> _Course:
        """The first step, or the one after the newest checkpoint."""
        held, compute, device = self.held, self.compute, self.compute.device
        optimizer = make_optimizer(self.student, [list(held.parameters.values())], self.config)
        state = load_checkpoint(self.journal, STAGE, compute)
        if state is None:
            course = _Course(optimizer, EMA(held.parameters, self.decay), BadSteps(device))
            if self.held_out:
                self._note_validation(course)
            return course
        with torch.no_grad():
            for name, value in state["parameters"].items():
                held.parameters[name].copy_(held.part(name, value))
        ema = EMA(held.parameters, self.decay)
        ema.values = {
            name: held.part(name, value.to(device, copy=True)) for name, value in state["ema"].items()
        }
        optimizer.load_state_dict(optimizer_state(state["optimizer"], self.names, held.part))
        window = [
            (
                {k: v.to(device) * compute.is_main for k, v in losses.items()},
                norm.to(device, copy=True),
            )  # they are summed
            for losses, norm in state["unlogged"]
        ]
        bad = BadSteps(device, state["skipped"], state["in_a_row"])
        return _Course(optimizer, ema, bad, state["step"], state["seconds"], state["validation"], window)

    def _backward(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of one step in place; this process's part of the losses, and the gradient norm before clipping."""
        config, found = self.config, dict[str, Tensor]()
        for index, weight in self.compute.parts(step_index(step, config.batch_size), config.micro_batch):
            batch = self.batches.at(index)
            answer = self._answer(index, batch)

            def objectives(
                model: nn.Module, batch: Batch = batch, answer: Tensor | None = answer
            ) -> tuple[Tensor, dict[str, Tensor]]:
                with self.compute.autocast():
                    return mixed_loss(self.family, model, self.reference, batch, config, self.layers, answer)

            loss, terms = self.held.call(objectives)
            (loss * (weight * self.held.loss_scale)).backward()
            for name, value in {"": loss.detach(), **terms}.items():
                found[name] = found.get(name, 0) + value * weight
        return found, self.held.finish_gradients(config.clip)

    def _answer(self, index: Tensor, batch: Batch) -> Tensor | None:
        """The teacher's prediction, from the folder of answers or for it; None: the loss asks for itself."""
        reference = self.reference
        if self.answers is None or reference is None:
            return None

        def ask() -> Tensor:
            with torch.no_grad(), self.compute.autocast():
                return self.family.predict(reference, batch.x_t, batch.t, batch.cond)

        return self.answers.at(index, ask).to(self.compute.device)

    def _log(self, course: _Course, clock: Clock, too_many: bool) -> None:
        step, window = course.step, course.window
        names = list(window[0][0])
        rows = [torch.stack(list(losses.values())) for losses, _ in window]
        loss, *values = self.compute.sum(torch.stack(rows).mean(dim=0)).tolist()
        terms = dict(zip(names[1:], values, strict=True))
        norm = torch.stack([norm for _, norm in window]).max().item()
        if too_many or not math.isfinite(loss):
            raise DivergedError(
                f"stage 2 diverged: loss {loss} and gradient norm {norm} at step {step}; "
                f"{what_helps(self.journal, step, self.config, self.compute.precision)}"
            )
        self.journal.log({
            "stage": STAGE, "step": step, "lr": learning_rate(self.config, step - 1), "loss": loss, "terms": terms,
            "grad_norm": norm if math.isfinite(norm) else None,
        })  # fmt: skip
        rate = (step - clock.first) * self.config.batch_size / max(clock.seconds, 1e-9)
        self.journal.progress(
            STAGE, step, self.config.steps, f"loss {loss:.4f}, {rate:.0f} images/s, ETA {clock.eta(step)}"
        )

    def _note_validation(self, course: _Course) -> None:
        loss = course.validation[course.step] = self._validate(course.ema)
        self.journal.log({"stage": STAGE, "step": course.step, "event": "validation", "loss": loss})

    @contextlib.contextmanager
    def _averaged(self, ema: EMA) -> Iterator[None]:
        """While inside, the model has the averaged weights."""
        ema.swap(self.held.parameters)
        self.held.train(False)
        try:
            with torch.no_grad(), self.compute.autocast():
                yield
        finally:
            ema.swap(self.held.parameters)
            self.held.train(True)

    def _validate(self, ema: EMA) -> float:
        """Held-out DiT loss of the averaged weights."""
        total, count = 0.0, 0
        with self._averaged(ema):
            for batch, counts in self.held_out:

                def predict(model: nn.Module, batch: Batch = batch) -> Tensor:
                    return self.family.predict(model, batch.x_t, batch.t, batch.cond)

                output = self.held.call(predict)
                if counts:
                    total += loss_from_output(output, batch.x0, batch.t, batch.noise)["loss"].sum().item()
                    count += len(batch.t)
        if self.compute.world > 1:
            total, count = self.compute.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
        return total / count

    def _preview(self, course: _Course) -> None:
        """A few quick samples [N, C, H, W] of the averaged weights, from the same noise every time."""
        if not (self.compute.is_main or self.held.takes_all):
            return
        index = torch.arange(self.config.preview_samples, device=self.compute.device)
        noise = draws.normal(self.seed, "preview", index, self.family.sample_shape(self.student))
        classes = self.family.num_classes(self.student)

        def some(rows: Tensor) -> Any:
            return rows % classes if classes else self.batches.conditions(rows.cpu())

        def draw(model: nn.Module, rows: Tensor) -> Tensor:
            return sample(model, noise[rows], some(rows), steps=10, sampler="dpm++", guidance=1.5)

        with self._averaged(course.ema):
            # guidance doubles a batch
            parts = index.split(max(1, samples_per_pass(self.config, self.compute.world) // 2))
            samples = torch.cat([self.held.call(partial(draw, rows=rows)) for rows in parts])
        self.journal.preview(STAGE, course.step, samples)

    def _checkpoint(self, course: _Course) -> None:
        held, main = self.held, self.compute.is_main
        if not (main or held.takes_all):
            return

        gathered: list[Tensor] = []

        def kept(name: str, value: Tensor) -> Tensor:
            whole = held.whole(name, value)
            if not held.takes_all:
                return whole
            gathered.append(whole.cpu() if main else torch.empty(0))  # at once: not all fit a device whole
            return gathered[-1]

        state = {
            "step": course.step, "seconds": course.seconds, "validation": course.validation,
            "skipped": course.bad.skipped, "in_a_row": course.bad.in_a_row,
            "parameters": {name: kept(name, p.detach()) for name, p in held.parameters.items()},
            "ema": {name: kept(name, value) for name, value in course.ema.values.items()},
            "optimizer": optimizer_state(course.optimizer.state_dict(), self.names, kept),
            "unlogged": list(course.window),
        }  # fmt: skip
        if main:
            self.writer.save(course.step, state, gathered)

    def _flops(self, visits: int) -> float:
        """Three student passes (forward, backward twice) per visit, and one of the teacher where it is matched."""
        matches = any(self.config.objectives.get(name, 0) > 0 for name in ("output", "features"))
        teacher = self.family.flops_per_image(self.teacher) if matches and self.teacher is not None else 0.0
        return visits * (3 * self.family.flops_per_image(self.student) + teacher)

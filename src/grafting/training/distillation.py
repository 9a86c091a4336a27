"""Stage 1, activation distillation: each new operator learns the donor's outputs on the donor's own inputs.

arXiv 2506.05340, section 3: E[L(g(x), f(x))]. All operators learn in one pass: one forward of the frozen teacher
gives the taps of all sites; each student operator in turn does its forward, loss and backward, so that one
operator's graph is alive at a time; then one optimizer step for all. A group of blocks side by side is one more pupil,
taught by the output of its blocks in sequence; operators that the plan replaced inside of it have their own lesson, and
their weights learn from that alone.
Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grafting import operators
from grafting.data import DataSource, as_data
from grafting.depth import open_groups
from grafting.errors import DivergedError, Interrupted, PlanError, RunError
from grafting.families import Family, Tap
from grafting.plan import Parallelize, Replace
from grafting.surgery import edited_groups, edited_sites, operator_name, record_of
from grafting.training.acceleration import compiled, frozen_copy
from grafting.training.cache import ActivationCache
from grafting.training.compute import Compute, make_compute
from grafting.training.config import DistillConfig, settings
from grafting.training.initialization import RelativeError, run_on
from grafting.training.loop import (
    Batch,
    Batches,
    Clock,
    Journal,
    Quiet,
    agreed,
    check_types,
    family_and_model,
    held_out,
    learning_rate,
    load_checkpoint,
    samples_per_pass,
    split,
    step_index,
    what_helps,
)
from grafting.training.optimizers import BadSteps, Optimizers, make_optimizer
from grafting.training.pupils import Pupil, pupils_of
from grafting.training.results import DistillResult
from grafting.training.reuse import ReusedTaps
from grafting.training.saving import CheckpointWriter
from grafting.training.starts import choose_losses, start_pupils

STAGE = "distill"


@torch.inference_mode(False)  # it trains, whatever the mode around the call
def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: DataSource | Any,
    config: DistillConfig | Mapping[str, Any] | None = None,
    *,
    journal: Journal | None = None,
) -> DistillResult:
    """Train the operators that a plan put into `student` to do what `teacher`'s do, in place.

    data: clean samples and labels, in any form that `grafting.data.as_data` takes. config: `DistillConfig` or its keys.
    journal: a run folder that logs, checkpoints and resumes; default: nothing is kept.
    Raises PlanError (the student has no plan), DataError, DivergedError (non-finite loss).
    """
    config = settings(DistillConfig, config, "distill")
    journal = journal or Quiet()
    if teacher is student:
        raise PlanError("the teacher is the student itself: give the model that was grafted as teacher")
    if record_of(student) is None and record_of(teacher) is not None:
        raise PlanError(
            "distill: the teacher was edited and the student was not: give distill(student, teacher, data)"
        )
    family = family_and_model(student, teacher)
    compute = make_compute(next(student.parameters()).device, config.precision)
    check_types(student, teacher, compute)
    teacher = teacher.to(compute.device).eval()
    student.to(compute.device)
    stage = _Stage(family, student, teacher, as_data(data), config, compute, journal)
    return stage.run()


class _Stage:
    def __init__(
        self, family: Family, student: nn.Module, teacher: nn.Module, data: DataSource, config: DistillConfig,
        compute: Compute, journal: Journal,
    ) -> None:  # fmt: skip
        self.family, self.student, self.teacher = family, student, teacher
        self.reference = frozen_copy(teacher, compute)  # for taps; self.teacher has the donors
        self.config, self.compute, self.journal = config, compute, journal
        self.writer = CheckpointWriter(journal, STAGE, config.keep_checkpoints)
        if config.reuse > 1 and compute.world > 1:
            raise RunError(
                f"distill.reuse={config.reuse} works in one process: several would reuse samples of their own, and the "
                "result would depend on their number; give reuse: 1, or run stage 1 in one process"
            )
        self.seed = config.seed or 0
        if not edited_sites(student) and not edited_groups(student):
            raise PlanError(
                "this model has no replaced operators or groups of blocks: distill trains what graft() put in; "
                "leave stage 1 out (distill: null)"
            )
        # An operator learns on its own, so its group must not hold its weights among others.
        self.opened = open_groups(family, student, {site.layer for site, _ in edited_sites(student).values()})
        self.pupils = pupils_of(family, student, teacher, config)
        self.reused: ReusedTaps | None = None
        self.bad = BadSteps(compute.device)
        train, validation = split(data, config.num_validation, self.seed)
        self.batches = Batches(
            train, family, teacher, seed=self.seed, purpose=STAGE,
            label_dropout=config.label_dropout, device=compute.device,
        )  # fmt: skip
        self.at_once = samples_per_pass(config, compute.world)
        self.validation = (
            held_out(self.batches, validation, config.batch_size, self.at_once)
            if validation is not None
            else []
        )

    def run(self) -> DistillResult:
        """Train, and leave the student as it runs best."""
        blocks = self.family.compilable(self.reference, tapped=True)
        pupils = [pupil.operator for pupil in self.pupils if isinstance(pupil.entry, Replace)]
        try:
            with self.writer, compiled([*blocks, *pupils], self.config.compile, self.compute.device):
                return self._run()
        finally:
            for group in self.opened:
                group.stack()

    def _run(self) -> DistillResult:
        config, pupils = self.config, self.pupils
        state = load_checkpoint(self.journal, STAGE, self.compute)
        optimizer = make_optimizer(
            self.student, [pupil.parameters for pupil in pupils if pupil.parameters], config
        )
        if state is None:
            start_error = self._start()
            first, seconds, losses = 0, 0.0, dict[str, list[Tensor]]()
            self.compute.equalise([v for pupil in pupils for v in pupil.operator.state_dict().values()])
        else:
            start_error, first, seconds, losses = self._restore(state, optimizer)
            del state  # the file is open as long as it is there
        cache = None
        learners = [pupil.path for pupil in pupils if pupil.parameters]
        if config.mode == "cached" and learners:
            cache = ActivationCache.collect(self, learners)
            self.compute.wait()  # of hours of writing one disk may need minutes more than another
        if config.reuse > 1:
            self.reused = ReusedTaps(
                lambda index, paths: self.taps(self.batches.at(index), paths), learners, seed=self.seed,
                batch_size=config.batch_size, micro_batch=config.micro_batch, reuse=config.reuse,
                passes=config.reuse_passes,
            )  # fmt: skip
        clock = Clock(first, config.steps)
        done = first

        for step in range(first, config.steps):
            if (code := self.compute.agree_to_stop(self.journal.stop_requested())) is not None:
                whole = agreed(self.compute, {path: torch.stack(values) for path, values in losses.items()})
                losses = {path: list(values) for path, values in whole.items()}
                self._check_losses({path: values[-1].item() for path, values in losses.items()}, step)
                self._checkpoint(step, optimizer, start_error, seconds + clock.seconds, losses)
                self.writer.wait()
                self.compute.wait()  # no process ends, and none is ended, before the file is there
                raise Interrupted(code, step)
            active = [pupil for pupil in pupils if pupil.rested_at is None]
            if not active:
                break
            optimizer.set_learning_rate(learning_rate(config, step))
            for path, loss in self._update(step, active, optimizer, cache).items():
                losses.setdefault(path, []).append(loss)
            done = step + 1
            if done % config.log_every == 0 or done % config.checkpoint_every == 0 or done == config.steps:
                self._log(done, losses, clock)
                losses = {}
            if done % config.validate_every == 0 or done == config.steps:
                self._validate(done)
            if done % config.checkpoint_every == 0 or done == config.steps:
                self._checkpoint(done, optimizer, start_error, seconds + clock.seconds)
                self.compute.wait()  # the first process may still have been writing the one before

        if config.keep_best and self.validation:
            for pupil in pupils:
                if pupil.best_state:
                    pupil.operator.load_state_dict(pupil.best_state)
        visits = done * config.batch_size
        return DistillResult(
            start_error=start_error,
            final_error=self.errors(),
            best_step={pupil.path: pupil.best_step for pupil in pupils},
            steps=done,
            image_visits=visits,
            flops=self._flops(visits),
            seconds=seconds + clock.seconds,
            extraction_seconds=cache.seconds if cache else 0.0,
            cache_bytes=cache.bytes if cache else 0,
            rested={pupil.path: pupil.rested_at for pupil in pupils if pupil.rested_at and pupil.parameters},
            skipped_steps=self.bad.skipped,
            losses={pupil.path: pupil.loss for pupil in pupils},
        )

    def taps(self, batch: Batch, paths: list[str]) -> dict[str, Tap]:
        """The teacher's taps on one batch."""
        with self.compute.autocast():
            return self.family.taps(self.reference, batch.x_t, batch.t, batch.cond, paths)

    def _update(
        self, step: int, active: list[Pupil], optimizer: Optimizers, cache: ActivationCache | None
    ) -> dict[str, Tensor]:
        """One optimizer step of all operators that still learn; this process's part of their losses."""
        config, compute = self.config, self.compute
        index = step_index(step, config.batch_size)
        found: dict[str, Tensor] = {}
        for part, weight in compute.parts(index, config.micro_batch):
            paths = [pupil.path for pupil in active]
            if cache is not None:
                taps = cache.at(part, paths)
            elif self.reused is not None:
                taps = self.reused.at(step, part - step * config.batch_size, paths)
            else:
                taps = self.taps(self.batches.at(part), paths)
            for pupil in active:
                with compute.autocast():
                    loss = pupil.loss_on(taps.pop(pupil.path)) * weight
                # A group's loss does not reach the operators in it that have a lesson of their own.
                loss.backward(inputs=pupil.parameters if isinstance(pupil.entry, Parallelize) else None)
                found[pupil.path] = found.get(pupil.path, 0) + loss.detach()
        compute.sum_gradients([parameter for pupil in active for parameter in pupil.parameters])
        norms = [nn.utils.clip_grad_norm_(pupil.parameters, config.clip) for pupil in active]
        # One gradient that is not finite leaves all operators as they are: none runs ahead of the others.
        optimizer.step(self.bad.note(torch.stack([norm.to(compute.device) for norm in norms]).max()))
        optimizer.zero_grad()
        return found

    def _log(self, step: int, losses: dict[str, list[Tensor]], clock: Clock) -> None:
        stacked = self.compute.sum(torch.stack([torch.stack(values).mean() for values in losses.values()]))
        means = dict(zip(losses, stacked.tolist(), strict=True))
        lr = learning_rate(self.config, step - 1)
        self.journal.log({"stage": STAGE, "step": step, "lr": lr, "loss": means})
        self._check_losses(means, step)
        if self.bad.longest > self.config.max_bad_steps:
            raise DivergedError(
                f"stage 1 diverged: {self.bad.longest} steps in a row had gradients that are not finite, up to step "
                f"{step}; {what_helps(self.journal, step, self.config, self.compute.precision)}"
            )
        mean = sum(means.values()) / max(1, len(means))
        self.journal.progress(
            STAGE, step, self.config.steps, f"loss {mean:.4f}, {len(means)} operators, ETA {clock.eta(step)}"
        )

    @torch.no_grad()
    def errors(self, operators_by_path: Mapping[str, nn.Module] | None = None) -> dict[str, float]:
        """Held-out relative error of every operator (the training batch's, if nothing is held out)."""
        modules = operators_by_path or {pupil.path: pupil.operator for pupil in self.pupils}
        if not modules:
            return {}
        batches = self.validation or [self._first()]
        sums = {path: [RelativeError(self.compute.device) for _ in batches] for path in modules}
        parts = [(number, part) for number, whole in enumerate(batches) for part in whole]
        for number, part in self.compute.mine(parts):
            taps = self.taps(part, list(modules))
            for path, module in modules.items():
                tap = taps.pop(path)
                with self.compute.autocast():
                    output = run_on(module, tap)
                sums[path][number].add(output, tap.output)
        whole = self.compute.sum(
            torch.stack([torch.stack([error.sums for error in found]) for found in sums.values()])
        )  # [operators, batches, 2], the same on all processes: they rest together
        values = (whole[..., 0] / whole[..., 1].clamp(min=1e-12)).tolist()
        return {
            path: sum(v / len(batches) for v in found) for path, found in zip(modules, values, strict=True)
        }

    def _first(self) -> list[Batch]:
        """The first training batch, in parts."""
        index = step_index(0, self.config.batch_size)
        return [self.batches.at(part) for part in index.split(self.at_once)]

    def _calibration(self, paths: list[str]) -> Iterator[dict[str, Tap]]:
        """The teacher's taps on the calibration samples, some at a time."""
        batches = Batches(
            self.batches.data, self.family, self.teacher, seed=self.seed, purpose=f"{STAGE}/calibration",
            label_dropout=self.config.label_dropout, device=self.compute.device,
        )  # fmt: skip
        size = min(self.config.fit_samples, len(self.batches.data))
        for chunk in torch.arange(size).split(self.at_once):
            yield self.taps(batches.at(chunk), paths)

    def _start(self) -> dict[str, dict[str, float]]:
        """Losses settled, readouts fitted; logs the error at step 0 of random, copied and fitted operators."""
        chosen = choose_losses(self.pupils, self._calibration, self.config.activations)
        if chosen is not None:
            self.journal.log({"stage": STAGE, "step": 0, "event": "loss", **chosen})
            agreed_on = self.compute.from_main([pupil.loss for pupil in self.pupils])
            for pupil, loss in zip(self.pupils, agreed_on, strict=True):
                pupil.loss = loss  # devices may round differently what it was chosen by
        found = start_pupils(
            self.family, self.student, self.teacher, self.pupils, self.config, self.errors, self._calibration,
            self.compute.device,
        )  # fmt: skip
        self.journal.log({"stage": STAGE, "step": 0, "event": "start", "error": found})
        self._check_start({path: error for kind in found.values() for path, error in kind.items()})
        if self.validation:
            self._note_best(0, self.errors())
        return found

    def _check_start(self, errors: Mapping[str, float]) -> None:
        """Raise DivergedError that names the first operator whose outputs are not finite before it has learnt."""
        for pupil in self.pupils:
            if not math.isfinite(errors[pupil.path]):
                other = "" if self.compute.precision == "fp32" else ", or use precision fp32"
                raise DivergedError(
                    f"stage 1 can't begin: at {pupil.path} '{operator_name(pupil.operator)}' gives outputs that are "
                    f"not finite on its donor's inputs, before the first step; look at its forward pass{other}"
                )

    def _check_losses(self, losses: Mapping[str, float], step: int) -> None:
        """Raise DivergedError that names the first operator whose loss is not finite."""
        bad = [path for path, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise DivergedError(
                f"stage 1 diverged: the loss of {bad[0]} is not finite at step {step}; "
                f"{what_helps(self.journal, step, self.config, self.compute.precision)}"
            )

    def _validate(self, step: int) -> None:
        learning = {pupil.path: pupil.operator for pupil in self.pupils if pupil.rested_at is None}
        if not self.validation or not learning:
            return
        errors = self.errors(learning)
        self.journal.log({"stage": STAGE, "step": step, "event": "validation", "error": errors})
        self._note_best(step, errors)

    def _note_best(self, step: int, errors: Mapping[str, float]) -> None:
        for pupil in self.pupils:
            if pupil.rested_at is None and pupil.note(step, errors[pupil.path], self.config):
                self.journal.log(
                    {"stage": STAGE, "step": step, "event": "rest", "path": pupil.path, "error": pupil.best}
                )

    def _checkpoint(
        self,
        step: int,
        optimizer: Optimizers,
        start_error: dict[str, dict[str, float]],
        seconds: float,
        unlogged: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        if not self.compute.is_main:
            return
        self.writer.save(step, {
            "step": step, "seconds": seconds, "start_error": start_error, "optimizer": optimizer.state_dict(),
            "skipped": self.bad.skipped, "in_a_row": self.bad.in_a_row,
            "unlogged": dict(unlogged or {}),  # losses since the last line of the log
            "pupils": {pupil.path: pupil.state() for pupil in self.pupils},
        })  # fmt: skip

    def _restore(
        self, state: dict[str, Any], optimizer: Optimizers
    ) -> tuple[dict[str, dict[str, float]], int, float, dict[str, list[Tensor]]]:
        """Errors at the start, steps, seconds, and losses since the last line of the log; no tensor of `state`."""
        for pupil in self.pupils:
            pupil.restore(state["pupils"][pupil.path])
        optimizer.load_state_dict(state["optimizer"])
        self.bad = BadSteps(self.compute.device, state["skipped"], state["in_a_row"])
        losses = {
            path: [loss.to(self.compute.device) * self.compute.is_main for loss in values]  # they are summed
            for path, values in state["unlogged"].items()
        }
        return state["start_error"], state["step"], state["seconds"], losses

    def _flops(self, visits: int) -> float:
        """One whole teacher pass, and three operator passes (forward, backward twice) of all pupils, per visit.

        Rested pupils are counted as if they still learned; passes on held-out and calibration samples are not counted.
        """
        passes = self.family.flops_per_image(self.teacher)
        cost = sum(
            operators.cost_of(p.operator, num_tokens=p.site.num_tokens, dim=p.site.width).total
            for p in self.pupils
            if p.parameters
        )
        stored = min(self.config.cache_samples, self.config.steps * self.config.batch_size)
        teacher = stored if self.config.mode == "cached" and visits else visits / self.config.reuse
        return passes * teacher + 3 * cost * visits

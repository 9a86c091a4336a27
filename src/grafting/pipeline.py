"""`graft run`: load, graft, distill, finetune, sample, evaluate, report, each stage recorded in the run folder.

Nothing flows backwards: a stage reads what the one before left, so that a run that was stopped goes on, and any
stage can be run alone.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grafting import operators
from grafting.analysis.memory import StagePeak, gigabytes
from grafting.console import Console
from grafting.data import DataSource, load_dataset
from grafting.data.text import CaptionDataset, CaptionSource
from grafting.errors import Interrupted, RunError
from grafting.evaluation import compare, evaluate
from grafting.evaluation.features import load_features
from grafting.evaluation.measure import NUM_NEIGHBOURS, check_measures
from grafting.evaluation.reference import FASHION_TRAIN, TEACHER
from grafting.families import family_of
from grafting.families.codec import check_latents, image_shape
from grafting.formats import weights
from grafting.formats.graft_folder import load_graft, save_graft
from grafting.generation import generate
from grafting.loading import as_device, load_model, pretraining_visits
from grafting.needs import expected, remedies, shortages, surely_fits
from grafting.out_of_memory import explained
from grafting.parts import remove_parts
from grafting.plan import Replace
from grafting.recipes import Recipe
from grafting.runs import RunFolder
from grafting.runs.trackers import check_trackers
from grafting.sizes import resized
from grafting.surgery import explain, graft, record_of
from grafting.synthesis import Synthesis
from grafting.synthesis import synthesize as make_pairs
from grafting.text_inputs import check_prompts, text_inputs
from grafting.training.compute import make_compute
from grafting.training.config import DistillConfig, FinetuneConfig, seeded, settings
from grafting.training.distillation import distill
from grafting.training.finetuning import finetune

STAGES = ("synthesize", "graft", "distill", "finetune", "sample", "evaluate")
OTHER_NOISE = 1_000_003  # added to the seed for the samples of the teacher that are a reference


@dataclass
class Pipeline:
    """The stages of one recipe in one run folder, each run at most once."""

    recipe: Recipe
    run: RunFolder
    device: str = "cpu"
    keep_stage_1: bool = False  # leave a copy of the student after stage 1 in stage-1/
    answers: Path | None = None  # a folder of the teacher's predictions, shared with other runs
    _teacher: nn.Module | None = None
    _data: DataSource | None = None
    _checked: bool = False  # to the end

    def __post_init__(self) -> None:
        self.compute = make_compute(as_device(self.device), "fp32")
        self.device = str(self.compute.device)

    @property
    def teacher(self) -> nn.Module:
        """The recipe's model, loaded once."""
        if self._teacher is None:
            teacher = load_model(
                self.recipe.model, num_heads=self.recipe.num_heads, device=self.device, dtype=self._dtype,
                pipeline=self.recipe.pipeline,
            )  # fmt: skip
            if family_of(teacher).num_classes(teacher) is None and self.recipe.synthesize is None:
                # it takes the size of the data
                teacher = resized(teacher, *self.data.shape[1:])
            self._teacher = teacher
        return self._teacher

    @property
    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.recipe.dtype) if self.recipe.dtype else None

    @property
    def captions(self) -> CaptionSource | None:
        """What a model that is conditioned on captions is sampled by: the recipe's prompts, or those of the data."""
        config = self.recipe.sample
        if config.prompts is not None:
            return text_inputs(
                self.teacher, prompts=config.prompts, limit=config.num, dtype=self._dtype, truncate=config.truncate
            )[1]  # fmt: skip
        return self.data if isinstance(self.data, CaptionDataset) else None

    @property
    def data(self) -> DataSource:
        """The recipe's data, or its stratified fraction."""
        if self._data is None:
            data = load_dataset(
                self.run.path / self.recipe.data if self.recipe.synthesize else self.recipe.data
            )
            self._data = (
                data.subset(self.recipe.fraction, self.recipe.seed) if self.recipe.fraction < 1 else data
            )
        return self._data

    def check(self, *, to_the_end: bool = False) -> None:
        """Everything that can be refused before any work: plan against model, data against model.

        to_the_end: this process will sample and measure, too, so whether it can is tried; a stage that will hardly fit
        the device's memory is said.
        """
        explain(self.teacher, self.recipe.graft_plan, self.recipe.locality)
        if self.recipe.synthesize is not None:
            made = self.recipe.synthesize
            check_prompts(self.teacher, made.prompts, limit=made.num, truncate=made.truncate)
        elif self.recipe.distill is not None or self.recipe.finetune is not None:
            from grafting.training.loop import Batches

            Batches(
                self.data, family_of(self.teacher), self.teacher, seed=0, purpose="check",
                label_dropout=0.0, device=torch.device(self.device),
            )  # fmt: skip
            check_latents(self.data, self.recipe.sample.vae)
        check_trackers(self.recipe.trackers)
        drawn = self.recipe.sample
        if drawn.prompts is not None:
            if family_of(self.teacher).num_classes(self.teacher) is not None:
                raise RunError(
                    "sample.prompts is for text-to-image models; this one takes class labels: leave it out"
                )
            check_prompts(self.teacher, drawn.prompts, limit=drawn.num, truncate=drawn.truncate)
        self.check_evaluation()
        if to_the_end:  # by every process: what it fetches from the hub can outlast a collective's patience
            shape = image_shape(self.teacher, drawn.vae)
            if self.compute.is_main and (config := self.recipe.evaluate) is not None:
                check_measures(config.reference, config.features, shape)
            if self.compute.is_main:
                for line in shortages(self.recipe, self.teacher, self.compute.device, self.compute.world):
                    self.run.console.say(f"warning: {line}")
        self._checked = self._checked or to_the_end

    def check_same(self, *, seed: int | None = None, dtype: str | None = None) -> None:
        """Refuse a seed or a type of the weights other than the run's: it has one recipe. Raises RunError."""
        held = self.recipe.dtype or (dtype and str(next(self.teacher.parameters()).dtype)[len("torch.") :])
        for name, given, own in (("seed", seed, self.recipe.seed), ("dtype", dtype, held)):
            if given not in (None, own):
                raise RunError(
                    f"--{name} {given}: the run in {str(self.run.path)!r} has {name} {own}; leave --{name} out, or "
                    f"make a new run with it (graft apply --{name} {given} --out OTHER)"
                )

    def check_evaluation(self) -> None:
        """What would otherwise be found out after hours of training."""
        config = self.recipe.evaluate
        if config is None:
            return
        if self.recipe.sample.num <= NUM_NEIGHBOURS:
            raise RunError(
                f"sample.num={self.recipe.sample.num} is too few to evaluate; give at least {NUM_NEIGHBOURS + 1}, "
                "or evaluate: null"
            )
        if config.reference not in (FASHION_TRAIN, TEACHER) and not Path(config.reference).is_file():
            raise RunError(
                f"evaluate.reference: no file {config.reference!r}; give {FASHION_TRAIN}, {TEACHER}, a sample .npz or "
                "an ADM .npz, or evaluate: null"
            )
        if config.features != "auto":
            load_features(config.features)

    def synthesize(self) -> dict[str, Any]:
        """Pairs of the teacher's own making, to train on; a stop loses a shard of them at most."""
        config = self.recipe.synthesize
        if config is None:
            raise RunError("this recipe has no synthesize settings")
        started = time.perf_counter()
        job = Synthesis(**config.model_dump(exclude={"prompts", "precision"}), seed=self.recipe.seed)
        with self.run.writing("synthesize"):
            make_pairs(
                self.recipe.model, config.prompts, self.run.path / self.recipe.data, job, resume=True,
                compute=make_compute(self.compute.device, config.precision), pipeline=self.recipe.pipeline,
                progress=lambda what, done, total: self.run.progress("synthesize", done, total, what),
            )  # fmt: skip
            result = {"seconds": time.perf_counter() - started, **config.model_dump(mode="json")}
            self.run.finish("synthesize", result)
        return result

    def graft(self) -> nn.Module:
        """Apply the plan and write plan.yaml and graft/."""
        with self.run.writing("graft"):
            return self._graft()

    def _graft(self) -> nn.Module:
        recipe, plan = self.recipe, self.recipe.graft_plan
        if recipe.student is None:
            student = graft(self.teacher, plan, seed=recipe.seed, locality=recipe.locality)
        else:
            student = self._saved_student()
        explanation = explain(self.teacher, plan, recipe.locality)
        if self.run.writer:
            explanation.plan.save(self.run.path / "plan.yaml")
        self.run.save_student(student)
        self.run.finish("graft", explanation.to_dict())
        return student

    def _saved_student(self) -> nn.Module:
        """The graft that the recipe goes on with. Raises CheckpointError, RunError (of another architecture)."""
        student = load_graft(str(self.recipe.student), base=self.teacher, device=self.device)
        record = record_of(student)
        if record is None or record.architecture != family_of(self.teacher).architecture(self.teacher):
            raise RunError(
                f"student: the graft in {self.recipe.student!r} was made of another architecture than model "
                f"{self.recipe.model!r}; name the model that it was made of"
            )
        return student

    def student(self, share: bool = False) -> nn.Module:
        """The student as the last finished stage left it; share: what is the teacher's is the teacher's own tensors."""
        if self.run.result("graft") is None:
            student = self.graft()
            if not share:
                return student
        return self.run.load_student(self.teacher, share).to(self.device)

    def distill(self) -> dict[str, Any]:
        """Stage 1."""
        config = seeded(self.recipe.distill or DistillConfig(), self.recipe.seed)
        return self._train(
            "distill", lambda student: distill(student, self.teacher, self.data, config, journal=self.run)
        )

    def finetune(self) -> dict[str, Any]:
        """Stage 2."""
        config = seeded(self.recipe.finetune or FinetuneConfig(), self.recipe.seed)
        return self._train(
            "finetune",
            lambda student: finetune(
                student, self.data, config, self.teacher, journal=self.run, answers=self.answers
            ),
        )

    def _leaves_the_rest(self, stage: str) -> bool:
        """Whether a stage trains new parts only, so that teacher and student can share what is left."""
        config = self.recipe.finetune
        return stage == "distill" or (
            config is not None and (config.lora is not None or config.train == "operators")
        )

    def _train(self, stage: str, work: Any) -> dict[str, Any]:
        with self.run.writing(stage), self._explained(stage):
            self.run.bind("data", self.data.name, self.data.content_hash)
            self._note_operators()
            student = self.student(share=self._leaves_the_rest(stage))
            expected, peak = self._expect(stage), StagePeak(self.compute.device)
            with self.run.stoppable():
                result = work(student).to_dict()
            found = peak.bytes()
            result["memory"] = {"estimated_bytes": expected, "peak_bytes": found, "source": peak.source}
            self.run.console.say(f"{stage}: peak memory {gigabytes(found)} ({peak.source})")
            result |= self.share_of_pretraining(result["flops"])
            self.run.save_student(student)
            if stage == "distill" and self.keep_stage_1 and self.run.writer:
                save_graft(student, self.run.path / "stage-1")
            self.run.finish(stage, result)
        self.compute.wait()  # for the first process to have written
        code = self.compute.agree_to_stop(self.run.stop_requested())
        if code is not None:  # it came after the last step
            raise Interrupted(code, result["steps"])
        return result

    def _note_operators(self) -> None:
        """Warn of operators of others whose code is no longer what this run began with: its results are of both."""
        used = {entry.operator for entry in self.recipe.graft_plan.entries if isinstance(entry, Replace)}
        hashes = {name: found for name in used if (found := operators.get(name).source_hash) is not None}
        for name in self.run.remember("operators", hashes) if hashes else ():
            self.run.console.say(
                f"warning: the code of operator {name!r} has changed since this run began; restore it, or make a new "
                "run (another --out) for results of one code alone"
            )

    def _expect(self, stage: str) -> int | None:
        """Say what memory a stage will take; bytes, or None where it can't be counted or would not matter."""
        given = (self.recipe, stage, self.teacher, self.compute.device, self.compute.world)
        parts = None if surely_fits(*given) else expected(*given)
        if parts is None:
            return None
        said = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if name != "total")
        self.run.console.say(f"{stage}: needs about {gigabytes(parts['total'])} of memory ({said})")
        return parts["total"]

    def _explained(self, stage: str) -> AbstractContextManager[None]:
        """While inside, running out of memory is an error that says what to set."""
        found = remedies(self.recipe, stage, family_of(self.teacher), self.compute.world, begun=True)
        return explained(f"{stage} on {self.device}", f"{found}; --resume goes on")

    def share_of_pretraining(self, flops: float) -> dict[str, Any]:
        """The cost of a stage against the teacher's pretraining (3 passes a visit), where that is known."""
        visits = (
            self.recipe.pretraining.image_visits
            if self.recipe.pretraining
            else pretraining_visits(self.teacher)
        )
        if not visits:
            return {}
        total = 3 * visits * family_of(self.teacher).flops_per_image(self.teacher)
        return {"pretraining_flops": total, "share_of_pretraining": flops / total}

    def sample(self) -> dict[str, Any]:
        """The same noise and labels through teacher and student; other noise through the teacher for a reference."""
        config, seed = self.recipe.sample, self.recipe.seed
        with self.run.writing("sample"), self._explained("sample"):
            seconds = {}
            models = [("teacher", self.teacher, seed), ("student", self.student(), seed)]
            if self.recipe.evaluate is not None and self.recipe.evaluate.reference == TEACHER:
                models.insert(1, ("reference", self.teacher, seed + OTHER_NOISE))
            captions = self.captions
            for number, (who, model, noise) in enumerate(models):
                started = time.perf_counter()
                drawn = (self.run.path / "samples" / f"{who}.npz").is_file()
                if who != "student" and self.compute.from_main(drawn):
                    if self.compute.is_main:  # an attempt that was killed as it ended may have left some
                        remove_parts(self.run.path / "samples" / f"{who}.npz")
                    continue  # drawn by an earlier attempt or row: files appear whole or not at all
                generate(
                    model, self.run.path / "samples" / f"{who}.npz", seed=noise, captions=captions,
                    **config.model_dump(exclude={"prompts", "truncate"}), describe={"model": who},
                    progress=lambda done, total, who=who, before=number: self.run.progress(  # type: ignore[misc]
                        "sample", before * total + done, len(models) * total, f"images, now of the {who}"
                    ),
                )  # fmt: skip
                seconds[who] = time.perf_counter() - started
            result = {"seconds": seconds, **config.model_dump(mode="json")}
            self.run.finish("sample", result)
            return result

    def evaluate(self) -> dict[str, Any]:
        """Measure both sample files and compare them; writes evaluation.json."""
        config = self.recipe.evaluate
        if config is None:
            raise RunError("this recipe has no evaluate settings")
        found: dict[str, Any] = {}
        reference = config.reference
        if reference == TEACHER:
            reference = str(self.run.path / "samples" / "reference.npz")
        with self.run.writing("evaluate"):
            for who in ("teacher", "student"):
                self.run.console.say(f"evaluating {who}")
                file = self.run.path / "samples" / f"{who}.npz"
                found[who] = evaluate(file, reference, config.features, device=self.device)
            found["comparison"] = compare(found["teacher"], found["student"])
            weights.write_json(self.run.path / "evaluation.json", found)
            self.run.finish("evaluate", found["comparison"])
        return found

    def report(self) -> Path:
        """Write report.html from what the run folder holds."""
        from grafting.report import write_report

        return write_report(self.run.path)

    def all(self) -> Path:
        """Every stage of the recipe that is not done yet, then the report.

        Of several processes all train and sample; the first alone writes and evaluates.
        """
        if not self._checked:
            self.check(to_the_end=True)
        wanted = {
            "synthesize": self.recipe.synthesize is not None, "graft": True,
            "distill": self.recipe.distill is not None, "finetune": self.recipe.finetune is not None,
            "sample": True, "evaluate": self.recipe.evaluate is not None,
        }  # fmt: skip
        with self.run.writing():
            for stage in STAGES:
                if not self.compute.is_main and stage == "evaluate":
                    break
                todo = wanted[stage] and self.run.result(stage) is None
                if todo if stage == "evaluate" else self.compute.from_main(todo):
                    self.run.console.say(f"[{stage}]")
                    getattr(self, stage)()
                if stage != "evaluate":
                    self.compute.wait()
            return self.report() if self.compute.is_main else self.run.path


def open_pipeline(path: str | Path, console: Console, device: str = "cpu") -> Pipeline:
    """The pipeline of an existing run folder."""
    run = RunFolder.open(path, console)
    pipeline = Pipeline(settings(Recipe, run.recipe(), f"{run.path / 'recipe.yaml'}"), run, device)
    if not pipeline.compute.is_main:
        pipeline.run = RunFolder(path, writer=False)
    return pipeline


__all__ = ["STAGES", "Pipeline", "open_pipeline"]

"""What a stage of a recipe will hold in memory, counted without values; said before the stage and in dry runs."""

from __future__ import annotations

from torch import nn

from grafting.analysis import estimate
from grafting.lora import Lora, add_lora, lora_targets
from grafting.plan import GraftPlan
from grafting.recipes import Recipe
from grafting.surgery import graft
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.loop import samples_per_pass


def stage_memory(
    recipe: Recipe, stage: str, teacher: nn.Module, plan: GraftPlan, precision: str, processes: int = 1
) -> dict[str, int]:
    """Bytes that a stage (distill, finetune, sample) of a recipe holds at its peak, by what they hold.

    teacher: on the meta device, in the type of the run; plan: with layer numbers.
    """
    student = student_of(recipe, stage, teacher, plan)
    if stage == "distill":
        distill = recipe.distill or DistillConfig()
        size = samples_per_pass(distill, processes)
        return estimate.distill_memory(teacher, student, distill, size, precision)
    if stage == "finetune":
        tune = recipe.finetune or FinetuneConfig()
        size = samples_per_pass(tune, processes)
        return estimate.finetune_memory(teacher, student, tune, size, precision)
    draw = recipe.sample
    size = 1 if draw.batch_size == "auto" else min(draw.num, draw.batch_size)  # auto: the least that it needs
    return estimate.sample_memory(teacher, student, size, draw.guidance, precision)


def student_of(recipe: Recipe, stage: str, teacher: nn.Module, plan: GraftPlan) -> nn.Module:
    """The student as a stage has it: what it shares with the teacher there is the teacher's own tensors."""
    tune = recipe.finetune if stage == "finetune" else None
    apart = stage == "sample" or (
        stage == "finetune" and (tune is None or (tune.lora is None and tune.train != "operators"))
    )
    student = graft(teacher, plan, share=not apart)
    if tune is not None and tune.lora is not None:
        targets = lora_targets(student, tune.lora.targets)
        add_lora(student, Lora(rank=tune.lora.rank, alpha=tune.lora.alpha, targets=targets))
    return student

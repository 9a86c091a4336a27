"""What a stage of a recipe will hold in memory, counted without values, and what to do where that is too much."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from grafting.analysis import estimate
from grafting.analysis.headroom import total_bytes
from grafting.analysis.memory import gigabytes, weight_bytes
from grafting.families import Family, family_of
from grafting.lora import Lora, add_lora, lora_targets
from grafting.plan import GraftPlan
from grafting.recipes import Recipe
from grafting.surgery import explain, graft
from grafting.training.compute import own_precision
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.loop import samples_per_pass

SURE = 0.5  # of the memory: what takes less by the loosest count is not counted in earnest
_MOST_PASSED = (
    64  # values that a pass keeps of one sample for each of a site's input; models here keep 1 to 20
)
_MOST_WEIGHTS = 16  # times the teacher's: of the student with gradients, moments and average, 5


def stage_memory(
    recipe: Recipe, stage: str, teacher: nn.Module, plan: GraftPlan, precision: str, processes: int = 1
) -> dict[str, int]:
    """Bytes that a stage (distill, finetune, sample) of a recipe holds at its peak, by what they hold.

    teacher: on the meta device, in the type of the run; plan: with layer numbers.
    """
    student, size = student_of(recipe, stage, teacher, plan), _size_of_pass(recipe, stage, processes)
    if stage == "distill":
        return estimate.distill_memory(teacher, student, recipe.distill or DistillConfig(), size, precision)
    if stage == "finetune":
        tune = recipe.finetune or FinetuneConfig()
        return estimate.finetune_memory(teacher, student, tune, size, precision, processes=processes)
    return estimate.sample_memory(teacher, student, size, recipe.sample.guidance, precision)


def expected(
    recipe: Recipe, stage: str, teacher: nn.Module, device: torch.device, processes: int
) -> dict[str, int] | None:
    """`stage_memory` of a recipe that is about to run with this teacher, or None where it can't be counted."""
    plan = explain(teacher, recipe.graft_plan, recipe.locality).plan
    config = getattr(recipe, stage) or (DistillConfig() if stage == "distill" else FinetuneConfig())
    precision = own_precision(device, config.precision)
    try:
        return stage_memory(recipe, stage, estimate.meta_copy(teacher), plan, precision, processes)
    except Exception:  # others' operators may raise anything without values: no reason not to run
        return None


def surely_fits(recipe: Recipe, stage: str, teacher: nn.Module, device: torch.device, processes: int) -> bool:
    """Whether a stage takes far less memory than a process has, by a bound that costs nothing (a count: seconds)."""
    share = _share(device, processes)
    return share is not None and _bound(recipe, stage, teacher, processes) < SURE * share


def shortages(recipe: Recipe, teacher: nn.Module, device: torch.device, processes: int) -> Iterator[str]:
    """Of each stage of a recipe that the device has too little memory for, by the estimate: a line that says so."""
    memory, share = total_bytes(device), _share(device, processes)
    if memory is None or share is None:
        return
    stages = {"distill": recipe.distill, "finetune": recipe.finetune, "sample": recipe.sample}
    for stage in [name for name, config in stages.items() if config is not None]:
        if surely_fits(recipe, stage, teacher, device, processes):
            continue
        parts = expected(recipe, stage, teacher, device, processes)
        if parts is not None and parts["total"] > share:
            yield (
                f"{stage} will hardly fit: it needs about {gigabytes(parts['total'])} of memory, and {device} has "
                f"{gigabytes(memory)}{f' for {processes} processes' if share < memory else ''}; "
                f"{remedies(recipe, stage, family_of(teacher), processes)}"
            )


def remedies(recipe: Recipe, stage: str, family: Family, processes: int = 1, *, begun: bool = False) -> str:
    """What to set so that a stage takes less memory; begun: of what `--resume` may still change."""
    if stage == "sample":
        return "lower sample.batch_size, or give auto"
    size, tune = _size_of_pass(recipe, stage, processes), recipe.finetune or FinetuneConfig()
    found = [f"lower {stage}.micro_batch (samples of a pass: {size} now)"] if size > 1 else []
    if stage == "finetune":
        if family.has_checkpointing and not tune.gradient_checkpointing:
            found.append("say gradient_checkpointing: true")
        if tune.shard == "none" and tune.optimizer != "muon":
            found.append(f"say shard: full{' and give --processes' if processes == 1 else ''}")
        if tune.lora is None and not begun:
            found.append("say lora")
    return ", or ".join(found) or "take a device with more memory"


def _size_of_pass(recipe: Recipe, stage: str, processes: int) -> int:
    """Samples that a process has at once."""
    if stage == "sample":
        draw = recipe.sample
        return (
            1 if draw.batch_size == "auto" else min(draw.num, draw.batch_size)
        )  # auto: the least that it needs
    tune = recipe.finetune or FinetuneConfig()
    return samples_per_pass(tune if stage == "finetune" else recipe.distill or DistillConfig(), processes)


def _share(device: torch.device, processes: int) -> int | None:
    """Bytes of memory for each process, where they are known: all processes of a run share that of the machine."""
    memory = total_bytes(device)
    return memory // processes if memory is not None and device.type == "cpu" else memory


def _bound(recipe: Recipe, stage: str, teacher: nn.Module, processes: int) -> int:
    """More bytes than a stage takes; that of a small model on any machine is known at no cost."""
    rows, first = _MOST_PASSED * _size_of_pass(recipe, stage, processes), recipe.distill
    if stage == "distill" and first is not None and first.reuse > 1:
        rows += 3 * first.reuse_passes * first.batch_size
    values = sum(site.num_tokens * site.width for site in family_of(teacher).sites(teacher))
    return 4 * rows * values + _MOST_WEIGHTS * weight_bytes(teacher)


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

"""The control without which a young teacher flatters any student: itself, finetuned with stage 2's budget."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from grafting.training.config import FinetuneConfig, seeded
from grafting.training.finetuning import finetune

if TYPE_CHECKING:
    from grafting.pipeline import Pipeline
    from grafting.runs import RunFolder


def finetune_teacher(pipeline: Pipeline, run: RunFolder) -> tuple[nn.Module, dict[str, Any]]:
    """A finetuned copy of the teacher, on the diffusion loss (matching itself would teach it nothing)."""
    recipe = pipeline.recipe
    config = seeded(recipe.finetune or FinetuneConfig(), recipe.seed)
    config = config.model_copy(update={"objectives": {"diffusion": 1.0}})
    model = copy.deepcopy(pipeline.teacher)
    with run.stoppable():
        outcome = finetune(model, pipeline.data, config, journal=run).to_dict()
    visits = {"flops": outcome["flops"], "seconds": outcome["seconds"]}
    return model, visits | pipeline.share_of_pretraining(outcome["flops"])

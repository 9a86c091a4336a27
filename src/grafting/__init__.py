"""grafting: edit the architecture of pretrained diffusion transformers.

Swap operators or rewire blocks of a pretrained model, teach the new parts by distilling the old ones, repair the whole
by light finetuning (arXiv 2506.05340). The user's story:

    teacher = grafting.load_model("dit-fashion")
    plan = grafting.GraftPlan([grafting.Replace("mha", "interleaved-50", "hyena_x")])
    student = grafting.graft(teacher, plan)
    grafting.distill(student, teacher, data, {"steps": 250})
    grafting.finetune(student, data, {"steps": 350}, teacher=teacher)
    grafting.save_graft(student, "my-graft")
"""

from grafting import diffusion, operators
from grafting.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    GraftError,
    OperatorError,
    PlanError,
    RunError,
)
from grafting.formats.graft_folder import load_graft, save_graft, save_model
from grafting.loading import load_model
from grafting.pipelines import load_pipeline, push_to_hub, save_pipeline
from grafting.plan import GraftPlan, Parallelize, Prune, Replace
from grafting.surgery import edited_sites, explain, graft
from grafting.training.config import DistillConfig, FinetuneConfig
from grafting.training.distillation import distill
from grafting.training.finetuning import finetune

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "DistillConfig",
    "DivergedError",
    "FinetuneConfig",
    "GraftError",
    "GraftPlan",
    "OperatorError",
    "Parallelize",
    "PlanError",
    "Prune",
    "Replace",
    "RunError",
    "diffusion",
    "distill",
    "edited_sites",
    "explain",
    "finetune",
    "graft",
    "load_graft",
    "load_model",
    "load_pipeline",
    "operators",
    "push_to_hub",
    "save_graft",
    "save_model",
    "save_pipeline",
]

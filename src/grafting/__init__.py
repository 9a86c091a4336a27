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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where each name lives. Loaded at first use: `graft --help` and a mistyped option wait for no torch.
_HOMES = {
    "CheckpointError": "grafting.errors",
    "DataError": "grafting.errors",
    "DivergedError": "grafting.errors",
    "GraftError": "grafting.errors",
    "OperatorError": "grafting.errors",
    "PlanError": "grafting.errors",
    "RunError": "grafting.errors",
    "load_graft": "grafting.formats.graft_folder",
    "save_graft": "grafting.formats.graft_folder",
    "save_model": "grafting.formats.graft_folder",
    "load_model": "grafting.loading",
    "load_pipeline": "grafting.pipelines",
    "push_to_hub": "grafting.pipelines",
    "save_pipeline": "grafting.pipelines",
    "GraftPlan": "grafting.plan",
    "Parallelize": "grafting.plan",
    "Prune": "grafting.plan",
    "Replace": "grafting.plan",
    "edited_sites": "grafting.surgery",
    "explain": "grafting.surgery",
    "graft": "grafting.surgery",
    "DistillConfig": "grafting.training.config",
    "FinetuneConfig": "grafting.training.config",
    "distill": "grafting.training.distillation",
    "finetune": "grafting.training.finetuning",
}


if not TYPE_CHECKING:  # a checker is to see the names above alone

    def __getattr__(name: str) -> Any:
        """A name of the package, or one of its modules (`grafting.data`), at first use."""
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Study `demo-ablation`: what each part of the method does."""

from __future__ import annotations

from grafting.recipes.rows import Row, Study
from grafting.recipes.table import plan_of

_RANDOM_HALF = plan_of("mha", "hyena_x", "interleaved-50", init="random")
_DIFFUSION = {"objectives": {"diffusion": 1.0}}

DEMO_ABLATION = Study(
    name="demo-ablation",
    title="What each part of the method does, on dit-fashion",
    about=(
        "Half of the attention of dit-fashion becomes hyena_x. Same data, noise and budgets in every row. "
        "Controls: the teacher under other noise, and the teacher finetuned with the same stage-2 budget."
    ),
    recipe="demo",
    rows=(
        Row("teacher", "teacher", teacher="as it is"),
        Row("teacher-noise", "teacher, other noise seed", teacher="other noise", seed=1000),
        Row("teacher-finetuned", "teacher, finetuned with the stage-2 budget", teacher="finetuned"),
        Row("random", "random init, no training", {"plan": _RANDOM_HALF, "distill": None, "finetune": None}),
        Row("stage-1", "stage 1 only", {"finetune": None}),
        Row("stage-2", "stage 2 only (donor init)", {"distill": None}),
        Row("both", "both stages (the demo)"),
        Row("both-diffusion", "both stages, diffusion loss only", {"finetune": _DIFFUSION}),
        Row("both-random", "both stages, random init", {"plan": _RANDOM_HALF}),
        Row("paper-like", "random init, diffusion loss only", {"plan": _RANDOM_HALF, "finetune": _DIFFUSION}),
        Row("self-graft", "all attention re-learned from random init",
            {"plan": plan_of("mha", "mha", "all", init="random")}),
        Row("budget-x3", "both stages, three times the steps", times={"distill.steps": 3, "finetune.steps": 3}),
    ),
)  # fmt: skip

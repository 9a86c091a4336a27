"""Settings and helpers of the tests of both stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grafting import GraftPlan, Replace
from grafting.data import ImageLabelDataset
from grafting.families import family_of
from grafting.training.loop import Batches

RANDOM = GraftPlan([Replace("mha", [1, 3], "hyena_x", init="random")])
CHECK = {"precision": "fp32", "batch_size": 16, "num_validation": 8, "warmup": 2}
STAGE_1: dict[str, Any] = {
    **CHECK,
    "steps": 24,
    "lr": 3e-3,
    "validate_every": 4,
    "checkpoint_every": 8,
    "log_every": 3,
}
STAGE_2: dict[str, Any] = {
    **STAGE_1,
    "lr": 1e-3,
    "objectives": {"diffusion": 0.5, "output": 1.0, "features": 0.1},
}


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[n], second[n]) for n in first)


def batches(data: ImageLabelDataset, model: nn.Module, purpose: str = "distill", **changes: Any) -> Batches:
    arguments = {
        "seed": 0,
        "purpose": purpose,
        "label_dropout": 0.1,
        "device": torch.device("cpu"),
        **changes,
    }
    return Batches(data, family_of(model), model, **arguments)

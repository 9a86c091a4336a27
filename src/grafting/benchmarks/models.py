"""The models and data that the benchmarks of training and sampling run on, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAN = [{"replace": {"target": "mha", "layers": "interleaved-50", "with": "hyena_x"}}]
NUM_SAMPLES = 512  # of random latents: their values matter to no time


def teacher_and_student(size: str, device: torch.device, plan: Any = None) -> tuple[nn.Module, nn.Module]:
    """`dit-fashion`, or DiT-<size> with random weights (XL/2-256, S/8-D2), and it with `plan` (default: `PLAN`)."""
    from grafting.loading import load_model
    from grafting.plan import GraftPlan
    from grafting.surgery import graft

    name = size if size == "dit-fashion" else f"arch:DiT-{size}"
    teacher = load_model(name, device=str(device)).eval()
    return teacher, graft(teacher, GraftPlan.from_dict(PLAN if plan is None else plan))


def data_for(model: nn.Module) -> Any:
    """Data of the model's shape: the packaged images, or random latents."""
    from grafting.data import ImageLabelDataset, load_dataset
    from grafting.families import family_of

    family = family_of(model)
    shape, classes = family.sample_shape(model), family.num_classes(model) or 1
    if shape == (1, 32, 32):
        return load_dataset("fashion-10")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_SAMPLES, *shape, generator=generator)
    return ImageLabelDataset(
        x, torch.arange(NUM_SAMPLES) % classes, name="random latents", num_classes=classes
    )

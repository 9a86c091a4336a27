"""The objectives of stage 2: the diffusion loss, and two that match the teacher.

Axes: B batch, C channels, H W height and width, N tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grafting.diffusion import loss_from_output
from grafting.diffusion.process import tables
from grafting.families import Family
from grafting.training.config import FinetuneConfig
from grafting.training.loop import Batch


def noise_weight(t: Tensor, cap: float) -> Tensor:
    """Truncated SNR weighting (arXiv 2202.00512, section 4): clamp(1 / SNR(t), 1, cap), mean 1 over all t: [B].

    1 / SNR turns a squared error of the noise into one of the image. Without it, t below 125 owns the loss of a student
    that is near its teacher, and the errors that decide an image's shape (t above 500) weigh nothing.
    """
    table = tables(t.device)
    inverse_snr = (table.sqrt_one_minus_alpha_bar / table.sqrt_alpha_bar).square().clamp(1.0, cap)
    return (inverse_snr / inverse_snr.mean())[t]


def output_loss(
    student: Tensor, teacher: Tensor, t: Tensor, channels: int, cap: float, variance: float
) -> Tensor:
    """Squared difference of two raw predictions [B, 2C or C, H, W] of C channels at timesteps t [B]: scalar.

    The noise half by `noise_weight`; the variance half, if there is one, times `variance`.
    """
    error = (student.float() - teacher.float()).square()
    noise = (noise_weight(t, cap) * error[:, :channels].mean(dim=(1, 2, 3))).mean()
    return noise + variance * error[:, channels:].mean() if error.shape[1] > channels else noise


def feature_loss(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], outliers: float) -> Tensor:
    """Squared difference of block outputs [B, N, D] over the teacher's square, averaged over B and L: scalar.

    The `outliers` share of a sample's largest |teacher| is left out: a few massive activations would own the loss. Each
    sample counts by itself, so that a batch may be cut.
    """
    total = torch.zeros((), device=next(iter(teacher.values())).device)
    for layer, target in teacher.items():
        target = target.float().flatten(1)  # [B, N D]
        error = (student[layer].float().flatten(1) - target).square()
        keep = torch.ones_like(error)
        if outliers > 0:
            magnitude = target.abs()
            some = magnitude[:, :: max(1, magnitude.shape[1] // 2**14)]  # quantile's input is bounded
            keep = (magnitude <= torch.quantile(some, 1 - outliers, dim=1, keepdim=True)).float()
        scale = (target.square() * keep).sum(dim=1).clamp(min=1e-12)
        total = total + ((error * keep).sum(dim=1) / scale).mean()
    return total / len(teacher)


def mixed_loss(
    family: Family, student: nn.Module, teacher: nn.Module | None, batch: Batch, config: FinetuneConfig,
    layers: tuple[int, ...], answer: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Weighted sum of the objectives on one batch, and its terms (unweighted, detached).

    answer: the teacher's prediction, where it is known; `features` ask the teacher all the same.
    """
    terms: dict[str, Tensor] = {}
    weights: Mapping[str, float] = {str(name): weight for name, weight in config.objectives.items()}
    use_features = weights.get("features", 0) > 0
    reference: Any = answer
    reference_features: dict[int, Tensor] = {}
    if teacher is not None and (use_features or weights.get("output", 0) > 0):
        with torch.no_grad():
            if use_features:
                reference, reference_features = family.predict_with_features(
                    teacher, batch.x_t, batch.t, batch.cond, layers
                )
            elif answer is None:
                reference = family.predict(teacher, batch.x_t, batch.t, batch.cond)
    if use_features:
        output, features = family.predict_with_features(student, batch.x_t, batch.t, batch.cond, layers)
        terms["features"] = feature_loss(features, reference_features, config.feature_outliers)
    else:
        output = family.predict(student, batch.x_t, batch.t, batch.cond)
    if weights.get("diffusion", 0) > 0:
        terms["diffusion"] = loss_from_output(output, batch.x0, batch.t, batch.noise)["loss"].mean()
    if weights.get("output", 0) > 0:
        terms["output"] = output_loss(
            output, reference, batch.t, batch.x0.shape[1], config.output_snr_cap, config.output_variance
        )
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return loss, {name: term.detach() for name, term in terms.items()}

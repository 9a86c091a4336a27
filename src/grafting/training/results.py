"""What the two stages say of themselves when they are done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DistillResult:
    """What stage 1 did. Errors are relative (mean |student - teacher| / mean |teacher|), per site, held out."""

    start_error: dict[str, dict[str, float]]  # random, copied, fitted -> path -> error at step 0
    final_error: dict[str, float]
    best_step: dict[str, int]
    steps: int
    image_visits: int
    flops: float
    seconds: float
    extraction_seconds: float = 0.0  # mode cached: of the teacher pass that filled the cache
    cache_bytes: int = 0  # mode cached: its size on disk
    rested: dict[str, int] = field(default_factory=dict)  # path -> step at which it stopped early
    skipped_steps: int = 0  # with gradients that were not finite
    losses: dict[str, str] = field(
        default_factory=dict
    )  # path -> regression loss, also where the plan said auto

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(vars(self))


@dataclass
class FinetuneResult:
    """What stage 2 did. `validation` is the held-out DiT loss of the averaged weights: step -> loss."""

    steps: int
    image_visits: int
    flops: float
    seconds: float
    trained_params: int
    ema_decay: float
    validation: dict[int, float]
    skipped_steps: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**vars(self), "validation": {str(step): loss for step, loss in self.validation.items()}}

"""What a result of training against a teacher depends on besides settings and seed: the head of a key to keep it by."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grafting.families import family_of
from grafting.formats import weights
from grafting.surgery import record_of
from grafting.training.compute import multiplies_bf16_fast


def circumstances(teacher: nn.Module, data_hash: str, device: str, precision: str) -> dict[str, Any]:
    """The teacher with its weights and edits, the data, versions, and how the device computes; in JSON types.

    It hashes all weights.
    """
    from grafting import __version__

    record, place = record_of(teacher), torch.device(device)
    return {
        "package": __version__,
        "torch": torch.__version__,
        "teacher": weights.combined_digest(weights.digests(teacher)),
        "architecture": family_of(teacher).architecture(teacher),
        "plan": record.plan.to_dict() if record else None,
        "data": data_hash,
        "device": place.type,
        "precision": precision,
        "bf16_products": multiplies_bf16_fast(place),
    }

"""One prediction of a model: of its family's kind, or of any module that takes (x, t, cond)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def predict(model: nn.Module, x: Tensor, t: Tensor, cond: Any, guidance: float = 1.0) -> Tensor:
    """Raw prediction [B, 2C or C, H, W] for noised x [B, C, H, W] at timesteps t [B].

    A model that no family knows is called as model(x, t, cond). guidance: 1 means none; other scales need a family,
    which says what stands for no condition. Raises GraftError.
    """
    from grafting.families import family_of, is_known

    if guidance != 1.0:
        return family_of(model).predict_guided(model, x, t, cond, guidance)
    if not is_known(model):
        output: Tensor = model(x, t, cond)
        return output
    return family_of(model).predict(model, x, t, cond)


__all__ = ["predict"]

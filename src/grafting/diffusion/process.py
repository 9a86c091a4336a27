"""The forward process q and its posterior, linear schedule of 1000 steps (DDPM, arXiv 2006.11239, section 2).

Axes: B batch, C channels, H W height and width. Coefficients are float64 tables, indexed by t and cast to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


@dataclass(frozen=True)
class Tables:
    """float32 tables [T] on one device."""

    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    posterior_log_variance: Tensor  # log beta-tilde, its value at t=0 taken from t=1 (beta-tilde_0 is 0)
    log_beta: Tensor


def tables(device: torch.device) -> Tables:
    """The coefficient tables on `device`; a family may ask for them in `predict`."""
    if (
        type(torch.empty(0)) is not Tensor
    ):  # an estimate computes with tensors without values: none of them may stay
        return _made(device)
    return _kept(device)


@lru_cache(maxsize=8)
def _kept(device: torch.device) -> Tables:
    return _made(device)


def _made(device: torch.device) -> Tables:
    beta = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1 - previous) / (1 - alpha_bar)  # beta-tilde, DDPM eq. 7
    columns = (
        alpha_bar.sqrt(),
        (1 - alpha_bar).sqrt(),
        beta * previous.sqrt() / (1 - alpha_bar),
        (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
        torch.cat([variance[1:2], variance[1:]]).log(),
        beta.log(),
    )
    return Tables(*(column.float().to(device) for column in columns))


def at(table: Tensor, t: Tensor) -> Tensor:
    """Read a table [T] at timesteps t [B] -> [B, 1, 1, 1]."""
    return table[t].reshape(-1, 1, 1, 1)


def add_noise(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """q(x_t | x_0): clean x0 [B, C, H, W] at timesteps t [B] with standard normal noise (DDPM eq. 4), in float32."""
    table = tables(x0.device)
    return at(table.sqrt_alpha_bar, t) * x0.float() + at(table.sqrt_one_minus_alpha_bar, t) * noise.float()

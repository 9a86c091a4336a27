"""The DiT loss: mse of the noise prediction plus the variational bound of the learned variance.

Improved DDPM (arXiv 2102.09672) section 3.1: L = L_simple + L_vlb, where the bound trains the variance only.
Axes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from grafting.diffusion.prediction import predict
from grafting.diffusion.process import add_noise, at, tables
from grafting.errors import DataError


def _kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N_1 || N_2) of diagonal Gaussians, in nats, elementwise."""
    return 0.5 * (
        log_var_2 - log_var_1 - 1 + torch.exp(log_var_1 - log_var_2)
        + (mean_1 - mean_2) ** 2 * torch.exp(-log_var_2)
    )  # fmt: skip


def _gaussian_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal CDF that the published code uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p of x0 in bins of 1/255 around it, the outer bins open (DDPM section 3.3), in nats, elementwise."""
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = _gaussian_cdf((x0 - mean + 1 / 255) * inverse_std)
    lower = _gaussian_cdf((x0 - mean - 1 / 255) * inverse_std)
    log_p = torch.where(
        x0 < -0.999,
        upper.clamp(min=1e-12).log(),
        torch.where(x0 > 0.999, (1 - lower).clamp(min=1e-12).log(), (upper - lower).clamp(min=1e-12).log()),
    )
    return -log_p


def loss_from_output(output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The loss of a raw prediction: {"loss", "mse", "vb"}, each [B].

    output: [B, 2C, H, W], noise prediction then variance coefficients ([B, C, H, W]: no learned variance, vb is 0);
    x0, noise: [B, C, H, W]; t: [B] in 0..999. vb is in bits per dimension and sees the noise prediction detached.
    """
    channels = x0.shape[1]
    if output.shape[1] not in (channels, 2 * channels) or output.shape[2:] != x0.shape[2:]:
        raise DataError(
            f"a prediction of shape {list(output.shape)} does not fit images of shape {list(x0.shape)}: "
            f"expected {channels} or {2 * channels} channels at the same size"
        )
    output, x0, noise = output.float(), x0.float(), noise.float()
    epsilon = output[:, :channels]
    mse = ((noise - epsilon) ** 2).mean(dim=(1, 2, 3))
    if output.shape[1] == channels:
        return {"loss": mse, "mse": mse, "vb": torch.zeros_like(mse)}

    table, fixed = tables(x0.device), epsilon.detach()
    x_t = add_noise(x0, t, noise)
    x0_hat = (x_t - at(table.sqrt_one_minus_alpha_bar, t) * fixed) / at(table.sqrt_alpha_bar, t)
    scale_x0, scale_xt = at(table.posterior_mean_x0, t), at(table.posterior_mean_xt, t)
    low, high = at(table.posterior_log_variance, t), at(table.log_beta, t)
    fraction = (output[:, channels:] + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low  # Improved DDPM eq. 15
    mean = scale_x0 * x0_hat + scale_xt * x_t
    kl = _kl(scale_x0 * x0 + scale_xt * x_t, low, mean, log_variance)
    nll = _discretized_nll(x0, mean, log_variance)
    vb = torch.where(t.reshape(-1, 1, 1, 1) == 0, nll, kl).mean(dim=(1, 2, 3)) / math.log(2)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def training_losses(model: nn.Module, x0: Tensor, t: Tensor, cond: Any, noise: Tensor) -> dict[str, Tensor]:
    """Noise x0 [B, C, H, W] to timesteps t [B], predict under conditioning `cond`, and score: each entry [B]."""
    return loss_from_output(predict(model, add_noise(x0, t, noise), t, cond), x0, t, noise)

"""Forward process, training losses and samplers of the published DiT."""

from grafting.diffusion.losses import loss_from_output, training_losses
from grafting.diffusion.process import NUM_TIMESTEPS, add_noise
from grafting.diffusion.sampling import SAMPLERS, sample

__all__ = ["NUM_TIMESTEPS", "SAMPLERS", "add_noise", "loss_from_output", "sample", "training_losses"]

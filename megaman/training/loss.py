"""The mathematics of one training step, as pure functions of tensors: noise and timesteps are
arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaman import cuda
from megaman.models.typed import get_velocity, scheduler_config

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def split_mask(posteriors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The VAE's posteriors and, if they come with one channel more, that as the mask of the loss
    [B, 1, h, w]. Posteriors have an even number of channels, means and log variances."""
    if posteriors.shape[1] % 2 == 0:
        return posteriors, None
    return posteriors[:, :-1], posteriors[:, -1:]


def sample_posterior(
    posterior: torch.Tensor, scaling_factor: float, generator: torch.Generator
) -> torch.Tensor:
    """Sample scaled latents [B, 4, h, w] from the VAE's posterior [B, 8, h, w], which is mean and
    log-variance; on its device, with random numbers from the CPU."""
    mean, logvar = posterior.float().chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    noise = cuda.upload(torch.randn(mean.shape, generator=generator), mean.device)
    return (mean + std * noise) * scaling_factor


def sample_noise(shape: torch.Size, offset: float, generator: torch.Generator) -> torch.Tensor:
    """Normal noise on the CPU.

    offset adds a share that is constant over each channel, so that dark and bright images can be
    learned (N. Guttenberg, "Diffusion with offset noise", 2023).
    """
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise += offset * torch.randn(shape[0], shape[1], 1, 1, generator=generator)
    return noise


def sample_timesteps(
    count: int, num_train_timesteps: int, generator: torch.Generator
) -> torch.Tensor:
    """Uniform timesteps, int64 [count]."""
    return torch.randint(0, num_train_timesteps, (count,), generator=generator)


def target(
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """What the UNet should predict: the noise, or the velocity of Salimans & Ho (2022, arXiv
    2202.00512)."""
    if scheduler_config(noise_scheduler).prediction_type == "v_prediction":
        return get_velocity(noise_scheduler, latents, noise, timesteps)
    return noise


def snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio at each timestep, [B]."""
    signal = alphas_cumprod.to(timesteps.device)[timesteps]
    return signal / (1 - signal)


def min_snr_weights(ratio: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """min(snr, gamma) / snr for noise prediction, / (snr + 1) for velocity (Hang et al. 2023, arXiv
    2303.09556)."""
    return ratio.clamp(max=gamma) / (ratio + 1 if prediction_type == "v_prediction" else ratio)


def loss_weights(
    noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None
) -> torch.Tensor | None:
    """The loss weights [B] at these timesteps; None without gamma."""
    if gamma is None:
        return None
    prediction_type = scheduler_config(noise_scheduler).prediction_type
    return min_snr_weights(snr(noise_scheduler.alphas_cumprod, timesteps), gamma, prediction_type)


def image_losses(
    noise_pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean squared error of each image, [B], in float32.

    A mask [B, 1, h, w] from 0 to 1 multiplies the squared errors. As in kohya's scripts, the mean
    is over all latents, so an image counts by the share that its mask leaves.
    """
    squared = (noise_pred.float() - target.float()).pow(2)
    return (squared if mask is None else squared * mask).mean(dim=(1, 2, 3))


def loss(
    noise_pred: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error over the images, each multiplied by its weight [B] if there are any, and
    within each by a mask [B, 1, h, w]; float32 throughout."""
    squared = image_losses(noise_pred, target, mask)
    return (squared if weights is None else squared * weights.to(squared.device)).mean()

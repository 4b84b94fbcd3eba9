"""The mathematics of one training step, as pure functions of tensors: their noise and timesteps are
arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def draw_latents(
    moments: torch.Tensor, scaling_factor: float, generator: torch.Generator
) -> torch.Tensor:
    """Sample latents [B, 4, h, w] from the VAE's moments [B, 8, h, w] (mean and log-variance) and
    scale them; on the moments' device, with numbers drawn on the CPU."""
    mean, logvar = moments.float().chunk(2, dim=1)
    deviation = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    drawn = torch.randn(mean.shape, generator=generator).to(mean.device, non_blocking=True)
    return (mean + deviation * drawn) * scaling_factor


def draw_noise(shape: torch.Size, offset: float, generator: torch.Generator) -> torch.Tensor:
    """Normal noise; offset adds a share that is constant over each channel, so that dark and bright
    pictures can be learnt (N. Guttenberg, "Diffusion with offset noise", 2023)."""
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise += offset * torch.randn(shape[0], shape[1], 1, 1, generator=generator)
    return noise


def draw_timesteps(
    count: int, num_train_timesteps: int, generator: torch.Generator
) -> torch.Tensor:
    """Uniform timesteps, int64 [count]."""
    return torch.randint(0, num_train_timesteps, (count,), generator=generator)


def target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet should predict: the noise, or the velocity of Salimans & Ho (2022, arXiv
    2202.00512)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio at each timestep, [B]."""
    signal = alphas_cumprod[timesteps]
    return signal / (1 - signal)


def min_snr_weights(ratio: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """min(snr, gamma) / snr for noise prediction, / (snr + 1) for velocity (Hang et al. 2023, arXiv
    2303.09556)."""
    return ratio.clamp(max=gamma) / (ratio + 1 if prediction_type == "v_prediction" else ratio)


def loss_weights(
    scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None
) -> torch.Tensor | None:
    """The weights [B] for a loss at these timesteps; None without a gamma."""
    if gamma is None:
        return None
    return min_snr_weights(
        snr(scheduler.alphas_cumprod, timesteps), gamma, scheduler.config.prediction_type
    )


def loss(
    noise_pred: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error, a picture at a time weighted by weights [B] where they are given; float32
    throughout."""
    squared = (noise_pred.float() - wanted.float()).pow(2).mean(dim=(1, 2, 3))
    return (squared if weights is None else squared * weights.to(squared.device)).mean()

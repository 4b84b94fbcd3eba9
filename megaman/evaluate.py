"""Has the LoRA learned? The denoising loss on pictures it never saw, at fixed noise and timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megaman import diffusion

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel


@torch.no_grad()
def held_out_loss(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: torch.Tensor,
    text_states: torch.Tensor,
    seed: int,
    draws: int = 8,
) -> float:
    """Mean loss over draws timesteps a picture, spread evenly over the schedule, with noise from the seed.

    latents is [N, 4, h, w], scaled; text_states [N, positions, width]. The same seed asks the same questions, so two
    models can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = scheduler.config.num_train_timesteps
    losses = []
    for draw in range(draws):
        place = (draw + torch.rand(len(latents), generator=generator)) / draws
        timesteps = (place * steps).long().clamp(max=steps - 1)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps).to(unet.device, unet.dtype)
        states = text_states.to(unet.device, unet.dtype)
        noise_pred = unet(noisy, timesteps.to(unet.device), encoder_hidden_states=states).sample
        wanted = diffusion.target(scheduler, latents, noise, timesteps).to(unet.device)
        losses.append(diffusion.loss(noise_pred, wanted))
    return float(torch.stack(losses).mean())


def gain(without: Sequence[float], with_lora: Sequence[float]) -> list[float]:
    """The share by which the LoRA lowers each loss."""
    return [1 - after / before for before, after in zip(without, with_lora, strict=True)]

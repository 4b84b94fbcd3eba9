"""The denoising loss on images that were not trained on, at noise that is the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from megaman.models.typed import add_noise, predict_noise, scheduler_config
from megaman.training import loss as diffusion

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from torch import nn

NUM_TIMESTEPS = 8  # per image, spread evenly over the schedule: one in each eighth


def held_out_loss(
    unet: nn.Module,
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    seed: int,
) -> float:
    """The mean of `held_out_losses`."""
    return float(held_out_losses(unet, noise_scheduler, latents, prompt_embeds, seed).mean())


@torch.no_grad()
def held_out_losses(
    unet: nn.Module,
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    seed: int,
    batch_size: int | None = None,
) -> torch.Tensor:
    """The loss of every image at NUM_TIMESTEPS timesteps, float32 [NUM_TIMESTEPS, N] on the CPU.

    latents is [N, 4, h, w], scaled; prompt_embeds [N, positions, width]. Row i has timesteps in the
    i-th part of the schedule. The same seed gives the same noise and timesteps, so two models can
    be compared. batch_size images pass the UNet at a time, or all N.
    """
    generator = torch.Generator().manual_seed(seed)
    device, dtype = cast(Any, unet).device, cast(Any, unet).dtype
    num_train_timesteps = scheduler_config(noise_scheduler).num_train_timesteps
    batch_size = batch_size or len(latents)
    rows = []
    for i in range(NUM_TIMESTEPS):
        position = (i + torch.rand(len(latents), generator=generator)) / NUM_TIMESTEPS
        timesteps = (position * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(noise_scheduler, latents, noise, timesteps)
        target = diffusion.target(noise_scheduler, latents, noise, timesteps)
        row = []
        for start in range(0, len(latents), batch_size):
            batch = slice(start, start + batch_size)
            noise_pred = predict_noise(
                unet,
                noisy[batch].to(device, dtype),
                timesteps[batch].to(device),
                prompt_embeds[batch].to(device, dtype),
            )
            row.append(diffusion.image_losses(noise_pred, target[batch].to(device)))
        rows.append(torch.cat(row))
    return torch.stack(rows).cpu()


def gain(without: Sequence[float], with_lora: Sequence[float]) -> list[float]:
    """The share by which the LoRA lowers each loss."""
    return [1 - after / before for before, after in zip(without, with_lora, strict=True)]

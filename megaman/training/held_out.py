"""The denoising loss on images that were not trained on, at noise that is the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from megaman.models.typed import add_noise, predict_noise, scheduler_config
from megaman.training import loss as diffusion

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from torch import nn

NUM_TIMESTEPS = 8  # per image, spread evenly over the schedule: one in each eighth
BATCH_SIZE = 32  # noisy latents that the UNet sees at a time


class ImageSet(NamedTuple):
    """Images to evaluate: the latents of each, scaled, [4, h, w], and the captions."""

    latents: list[torch.Tensor]
    captions: list[str]


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
    batch_size: int = BATCH_SIZE,
) -> torch.Tensor:
    """The loss of every image at NUM_TIMESTEPS timesteps, float32 [NUM_TIMESTEPS, N] on the CPU.

    latents is [N, 4, h, w], scaled; prompt_embeds [N, positions, width]. Row i has timesteps in the
    i-th part of the schedule. The same seed gives the same noise and timesteps, so two models can
    be compared. The UNet sees batch_size noisy latents at a time.
    """
    questions = Questions.ask(noise_scheduler, latents, prompt_embeds, seed)
    losses = [questions.losses(unet, batch) for batch in questions.batches(batch_size)]
    return torch.cat(losses).view(NUM_TIMESTEPS, -1)


class Questions(NamedTuple):
    """NUM_TIMESTEPS noisy latents of each of N images, those of the first part of the schedule
    first: timesteps [NUM_TIMESTEPS * N] and noise [NUM_TIMESTEPS * N, 4, h, w] for latents
    [N, 4, h, w] with prompt_embeds [N, positions, width]."""

    noise_scheduler: DDPMScheduler
    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def ask(
        cls,
        noise_scheduler: DDPMScheduler,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        seed: int,
    ) -> Questions:
        """Those of a seed, always the same."""
        timesteps, noise = _questions(noise_scheduler, latents, seed)
        return cls(noise_scheduler, latents, prompt_embeds, timesteps, noise)

    def batches(self, size: int) -> list[range]:
        """All questions, in batches of this size."""
        count = len(self.timesteps)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @torch.no_grad()
    def losses(self, unet: nn.Module, batch: range) -> torch.Tensor:
        """The loss of each question of a batch, float32 on the CPU."""
        device, dtype = cast(Any, unet).device, cast(Any, unet).dtype
        if dtype.itemsize == 1:  # float8 only stores the weights
            dtype = self.prompt_embeds.dtype
        chosen = slice(batch.start, batch.stop)
        images = torch.arange(batch.start, batch.stop) % len(self.latents)
        clean, noise, steps = self.latents[images], self.noise[chosen], self.timesteps[chosen]
        noisy = add_noise(self.noise_scheduler, clean, noise, steps)
        target = diffusion.target(self.noise_scheduler, clean, noise, steps)
        embeds = self.prompt_embeds[images.to(self.prompt_embeds.device)]
        noise_pred = predict_noise(
            unet, noisy.to(device, dtype), steps.to(device), embeds.to(device, dtype)
        )
        return diffusion.image_losses(noise_pred, target.to(device)).cpu()


def _questions(
    noise_scheduler: DDPMScheduler, latents: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps [NUM_TIMESTEPS * N] and noise [NUM_TIMESTEPS * N, 4, h, w] for N images, those of
    the first part of the schedule first."""
    generator = torch.Generator().manual_seed(seed)
    num_train_timesteps = scheduler_config(noise_scheduler).num_train_timesteps
    timesteps, noise = [], []
    for i in range(NUM_TIMESTEPS):
        position = (i + torch.rand(len(latents), generator=generator)) / NUM_TIMESTEPS
        steps = (position * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
        timesteps.append(steps)
        noise.append(torch.randn(latents.shape, generator=generator))
    return torch.cat(timesteps), torch.cat(noise)


def gain(without: Sequence[float], with_lora: Sequence[float]) -> list[float]:
    """The share by which the LoRA lowers each loss."""
    return [1 - after / before for before, after in zip(without, with_lora, strict=True)]

"""Prompts and seeds to images: the same code draws validation pictures while training and the
gallery afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import diffusers
import torch
from PIL import Image

from megaman.config import samplers
from megaman.errors import UserError
from megaman.models.base import vae_scale_factor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel


def make_sampler(
    scheduler: SchedulerMixin, sampler: samplers.Sampler = samplers.DEFAULT
) -> SchedulerMixin:
    """A sampler on the base's own noise schedule; by default DPM-Solver++ (2M), Lu et al. 2022,
    arXiv 2211.01095."""
    return getattr(diffusers, sampler.scheduler).from_config(scheduler.config, **sampler.settings)


def count_passes(scheduler: SchedulerMixin, sampler: samplers.Sampler, steps: int) -> int:
    """How often the UNet runs in so many steps: Heun's and DPM2's samplers look twice."""
    counted = make_sampler(scheduler, sampler)
    counted.set_timesteps(steps)
    return len(counted.timesteps)


@torch.no_grad()
def draw_latents(
    unet: UNet2DConditionModel,
    sampler: SchedulerMixin,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Latents [B, 4, h, w] for each row of prompt_embeds [B, positions, width], with the seed of the
    same place.

    negative_prompt_embeds, of the same shape, holds the negative prompts (classifier-free guidance, Ho &
    Salimans 2022, arXiv 2207.12598); guidance of 1 or less leaves them out. size is (h, w) in
    latent cells. Each row's noise, the first and what a sampler adds on the way, comes from its own
    seed and on the CPU, so that neither the batch nor the device changes it. Raises UserError where
    the UNet answers with numbers that are not finite.
    """
    device, dtype = unet.device, unet.dtype
    sampler.set_timesteps(steps, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [
        torch.randn((unet.config.in_channels, *size), generator=generator)
        for generator in generators
    ]
    latents = torch.stack(noise).to(device) * sampler.init_noise_sigma
    adds_noise = (
        {"generator": generators}
        if "generator" in inspect.signature(sampler.step).parameters
        else {}
    )
    guided = guidance > 1
    states = (torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds).to(
        device, dtype
    )
    for timestep in sampler.timesteps:
        model_input = sampler.scale_model_input(
            torch.cat([latents, latents]) if guided else latents, timestep
        )
        noise_pred = unet(
            model_input.to(dtype), timestep, encoder_hidden_states=states
        ).sample.float()
        if guided:
            without, with_prompt = noise_pred.chunk(2)
            noise_pred = without + guidance * (with_prompt - without)
        latents = sampler.step(noise_pred, timestep, latents, **adds_noise).prev_sample
        on_step()
    if not torch.isfinite(latents).all():
        raise UserError(
            "The images came out as not-a-number: the LoRA is broken, or fp16 is too coarse for this base",
            "Take an earlier checkpoint, or compute on the CPU",
        )
    return latents


def draw_images(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    sampler: SchedulerMixin,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor,
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int,
    guidance: float,
    on_step: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """The same as images; height and width are in pixels."""
    size = height // vae_scale_factor(vae), width // vae_scale_factor(vae)
    latents = draw_latents(
        unet, sampler, prompt_embeds, negative_prompt_embeds, seeds, size, steps, guidance, on_step
    )
    return decode(vae, latents)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Images of latents [B, 4, h, w] as the UNet knows them, one at a time: decoding is where
    memory peaks.

    In the VAE's own precision, whatever autocast is on around it: in fp16 some pictures come out
    black.
    """
    images = []
    for latent in latents:
        with torch.autocast(vae.device.type, enabled=False):
            unscaled = latent[None].to(vae.device, vae.dtype) / vae.config.scaling_factor
            pixels = vae.decode(unscaled).sample[0].float()
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        images.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
    return images

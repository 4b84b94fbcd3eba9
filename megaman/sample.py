"""Prompts and seeds to images: the same code draws validation pictures while training and the gallery afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from megaman.base import vae_factor
from megaman.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel

SAMPLER_NAME = "DPM++ 2M"  # as A1111 calls it
PIXELS_AT_ONCE = 512 * 512  # pictures drawn together come to this many pixels at most, so that 8 GB are enough


def images_at_once(height: int, width: int) -> int:
    """How many pictures of this size are drawn in one batch."""
    return max(1, PIXELS_AT_ONCE // (height * width))


def make_sampler(scheduler: SchedulerMixin) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (2M) on the base's own noise schedule (Lu et al. 2022, arXiv 2211.01095)."""
    return DPMSolverMultistepScheduler.from_config(scheduler.config)


def first_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Starting noise [B, 4, h, w] float32: each picture's from its own seed and on the CPU, so that neither the batch
    nor the device changes it."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def draw_images(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    sampler: DPMSolverMultistepScheduler,
    text_states: torch.Tensor,
    empty_states: torch.Tensor,
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int,
    guidance: float,
    on_step: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """Draw one image for each row of text_states [B, positions, width] with the seed of the same place.

    empty_states, of the same shape, holds the negative prompts (classifier-free guidance, Ho & Salimans 2022, arXiv
    2207.12598); guidance of 1 or less leaves them out. height and width are in pixels. Raises UserError where the UNet
    answers with numbers that are not finite.
    """
    device, dtype = unet.device, unet.dtype
    factor = vae_factor(vae)
    sampler.set_timesteps(steps, device=device)
    latents = first_noise(seeds, (unet.config.in_channels, height // factor, width // factor)).to(device)
    latents = latents * sampler.init_noise_sigma
    guided = guidance > 1
    states = (torch.cat([empty_states, text_states]) if guided else text_states).to(device, dtype)
    for timestep in sampler.timesteps:
        model_input = sampler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        noise_pred = unet(model_input.to(dtype), timestep, encoder_hidden_states=states).sample.float()
        if guided:
            without, with_prompt = noise_pred.chunk(2)
            noise_pred = without + guidance * (with_prompt - without)
        latents = sampler.step(noise_pred, timestep, latents).prev_sample
        on_step()
    if not torch.isfinite(latents).all():
        raise UserError(
            "The images came out as not-a-number: the LoRA is broken, or fp16 is too coarse for this base",
            "Take an earlier checkpoint, or compute on the CPU",
        )
    return decode(vae, latents / vae.config.scaling_factor)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Images of unscaled latents [B, 4, h, w], one at a time: decoding is where memory peaks.

    In the VAE's own precision, whatever autocast is on around it: in fp16 some pictures come out black.
    """
    images = []
    for latent in latents:
        with torch.autocast(vae.device.type, enabled=False):
            pixels = vae.decode(latent[None].to(vae.device, vae.dtype)).sample[0].float()
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        images.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
    return images

"""Prompt embeddings and seeds to images. Validation during training and generation share this
code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import diffusers
import torch
from PIL import Image

from megaman.config import samplers
from megaman.errors import UserError
from megaman.models.text_encoding import pad_chunks
from megaman.models.typed import (
    SamplingScheduler,
    decode_latents,
    predict_noise,
    scheduler_config,
    unet_config,
    vae_config,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from megaman.models.base import Base


@dataclass(frozen=True)
class SamplingSettings:
    """How a batch is sampled; height and width are in pixels."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: samplers.Sampler = samplers.DEFAULT


class PromptEmbeds(NamedTuple):
    """Embeddings [B, positions, width] of a batch's prompts and of its negative prompts."""

    positive: torch.Tensor
    negative: torch.Tensor


def make_prompt_embeds(
    positive: Sequence[torch.Tensor], negative: Sequence[torch.Tensor], empty: torch.Tensor
) -> PromptEmbeds:
    """The embeds [chunks * positions, width] of each image's prompt and negative prompt as a batch,
    all brought to the length of the longest; empty are those of the empty prompt."""
    chunks = max(len(embeds) // len(empty) for embeds in [*positive, *negative])

    def stack(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([pad_chunks(row, empty, chunks) for row in rows])

    return PromptEmbeds(stack(positive), stack(negative))


def make_sampler(
    noise_scheduler: DDPMScheduler, sampler: samplers.Sampler = samplers.DEFAULT
) -> SamplingScheduler:
    """A diffusers scheduler to sample with, on the base's own noise schedule; by default
    DPM-Solver++ (2M), Lu et al. 2022, arXiv 2211.01095."""
    scheduler_class = getattr(diffusers, sampler.scheduler)
    return scheduler_class.from_config(scheduler_config(noise_scheduler), **sampler.settings)


def count_unet_calls(
    noise_scheduler: DDPMScheduler, sampler: samplers.Sampler, num_inference_steps: int
) -> int:
    """How often the UNet runs: Heun and DPM2 call it twice a step."""
    scheduler = make_sampler(noise_scheduler, sampler)
    scheduler.set_timesteps(num_inference_steps)
    return len(scheduler.timesteps)


@torch.no_grad()
def denoise(
    unet: UNet2DConditionModel,
    scheduler: SamplingScheduler,
    prompt_embeds: PromptEmbeds,
    latents: InitialLatents,
    settings: SamplingSettings,
    on_step: Callable[[], object],
) -> torch.Tensor:
    """Denoise latents [B, 4, h, w] with a scheduler of `make_sampler`.

    The negative prompts serve classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598);
    a guidance_scale of 1 or less ignores them. Raises UserError if the result is not finite.
    """
    device, dtype = unet.device, unet.dtype
    scheduler.set_timesteps(settings.num_inference_steps, device=device)
    step_options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = latents.generators
    guided = settings.guidance_scale > 1
    embeds = prompt_embeds.positive
    if guided:
        embeds = torch.cat([prompt_embeds.negative, prompt_embeds.positive])
    embeds = embeds.to(device, dtype)
    sample = latents.noise.to(device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = torch.cat([sample, sample]) if guided else sample
        model_input = scheduler.scale_model_input(model_input, timestep)
        noise_pred = predict_noise(unet, model_input.to(dtype), timestep, embeds).float()
        if guided:
            negative, positive = noise_pred.chunk(2)
            noise_pred = negative + settings.guidance_scale * (positive - negative)
        sample = scheduler.step(noise_pred, timestep, sample, **step_options).prev_sample
        on_step()
    if not torch.isfinite(sample).all():
        raise UserError(
            "The images came out as NaN: the LoRA is broken, or fp16 is too coarse for this base",
            "Use an earlier checkpoint, or generate with --device cpu",
        )
    return sample


class InitialLatents:
    """Noise [B, 4, h, w] to begin with and the generators for the noise that some samplers add.

    Each image has a generator of its own, on the CPU, so that neither the batch nor the device
    changes its noise. latent_size is (h, w).
    """

    def __init__(self, channels: int, latent_size: tuple[int, int], seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (channels, *latent_size)
        noise = [torch.randn(shape, generator=generator) for generator in self.generators]
        self.noise = torch.stack(noise)


def generate_latents(
    base: Base,
    prompt_embeds: PromptEmbeds,
    seeds: Sequence[int],
    settings: SamplingSettings,
    on_step: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Latents [B, 4, h, w] of a batch, one image a seed; the UNet is where it is to run."""
    factor = base.vae_scale_factor
    latent_size = (settings.height // factor, settings.width // factor)
    latents = InitialLatents(unet_config(base.unet).in_channels, latent_size, seeds)
    scheduler = make_sampler(base.noise_scheduler, settings.sampler)
    return denoise(base.unet, scheduler, prompt_embeds, latents, settings, on_step)


def generate_images(
    base: Base,
    prompt_embeds: PromptEmbeds,
    seeds: Sequence[int],
    settings: SamplingSettings,
    on_step: Callable[[], object] = lambda: None,
) -> list[Image.Image]:
    """`generate_latents`, decoded to images."""
    return decode(base.vae, generate_latents(base, prompt_embeds, seeds, settings, on_step))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Images of the UNet's latents [B, 4, h, w], one at a time: decoding is where memory peaks.

    In the VAE's own precision whatever autocast says: in fp16 some images come out black.
    """
    images = []
    for latent in latents:
        with torch.autocast(vae.device.type, enabled=False):
            unscaled = latent[None].to(vae.device, vae.dtype) / vae_config(vae).scaling_factor
            pixels = decode_latents(vae, unscaled)[0].float()
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        images.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
    return images

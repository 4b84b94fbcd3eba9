"""diffusers' and transformers' models as a type checker can follow them.

Their configurations are dicts with attributes, `to` is a decorated function, and encode and decode
may return a tuple. Each function here does one such thing and returns a type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

Model = TypeVar("Model", bound=nn.Module)


class UNetConfig(Protocol):
    """The part of UNet2DConditionModel.config that is used here."""

    sample_size: int  # latents a side
    in_channels: int
    block_out_channels: Sequence[int]
    cross_attention_dim: int


class VaeConfig(Protocol):
    """The part of AutoencoderKL.config that is used here."""

    block_out_channels: Sequence[int]
    latent_channels: int
    scaling_factor: float


class SchedulerConfig(Protocol):
    """The part of a noise scheduler's config that is used here."""

    num_train_timesteps: int
    prediction_type: str


class SamplingScheduler(Protocol):
    """One of diffusers' schedulers as sampling uses it; step returns an output with prev_sample."""

    config: Any
    timesteps: Tensor
    init_noise_sigma: float | Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor: ...

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **extra: Any) -> Any: ...


def unet_config(unet: UNet2DConditionModel) -> UNetConfig:
    """The configuration of a UNet."""
    return cast(UNetConfig, unet.config)


def vae_config(vae: AutoencoderKL) -> VaeConfig:
    """The configuration of a VAE."""
    return cast(VaeConfig, vae.config)


def scheduler_config(scheduler: DDPMScheduler | SamplingScheduler) -> SchedulerConfig:
    """The configuration of a noise scheduler."""
    return cast(SchedulerConfig, scheduler.config)


def move(model: Model, *args: Any, **kwargs: Any) -> Model:
    """model.to(*args, **kwargs), without the libraries' own, which look for quantization and
    offloading in every layer first."""
    nn.Module.to(cast(nn.Module, model), *args, **kwargs)
    return model


def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> DiagonalGaussianDistribution:
    """The distribution of the unscaled latents [B, 4, h, w] of pixels [B, 3, H, W] in -1 to 1."""
    return cast(Any, vae.encode(pixels)).latent_dist


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] around -1 to 1 of unscaled latents [B, 4, h, w]."""
    return cast(Any, vae.decode(cast(torch.FloatTensor, latents))).sample


def predict_noise(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor
) -> Tensor:
    """The UNet's output [B, 4, h, w] for noisy latents, each at its timestep [B] or all at one."""
    return unet(latents, timesteps, encoder_hidden_states=prompt_embeds).sample


def add_noise(
    scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Latents [B, 4, h, w] with noise of the same shape, each as noisy as its timestep [B]."""
    return scheduler.add_noise(latents, noise, cast(torch.IntTensor, timesteps))


def get_velocity(
    scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """The target of v-prediction [B, 4, h, w] (Salimans & Ho 2022, arXiv 2202.00512)."""
    return scheduler.get_velocity(latents, noise, cast(torch.IntTensor, timesteps))

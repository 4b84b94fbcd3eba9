"""The memory that a run will need, estimated before it starts: a training step and a sample image
are traced without weights or images.

A GB is 2**30 bytes, as for GPUs. The storages of tensors without contents are counted, on a CPU
with what its allocator adds. The CUDA context, the libraries' workspaces and fragmentation come on
top; so memory_plan.py takes measures from runtime.USABLE of the memory on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from megaman import runtime
from megaman.config.learning_settings import OPTIMIZERS
from megaman.config.settings import MemoryRequest
from megaman.errors import UserError, summarize_error
from megaman.lora import adapter
from megaman.models.base import CONFIGURATION_ERRORS
from megaman.models.configs import BASE_REMEDY
from megaman.models.float8 import store_in_float8
from megaman.models.typed import decode_latents, move, predict_noise, unet_config, vae_config
from megaman.models.vae_tiling import tile_side
from megaman.training import loss as diffusion
from megaman.training.fake_models import FakeModels, norms_in_float32, tensor_bytes
from megaman.training.memory_saving import checkpoint_gradients, keep_activations
from megaman.training.trace_cache import TraceCache

GB = 2**30
# Bytes resident on a CPU per byte of activations: the allocator's gaps and oneDNN's scratch
# memory, measured by benchmarks/memory.py.
RESIDENT = 1.5
FLOAT32 = 4  # bytes per number of the LoRA, of its gradient, and of AdamW's two moments


class _Models(NamedTuple):
    """The models of a base on the device meta, and the parameters of the LoRA in them."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    lora_parameters: list[nn.Parameter]


def _build_models(
    configs: Mapping[str, Mapping[str, Any]], request: MemoryRequest, dtype: torch.dtype
) -> _Models:
    inject = partial(
        adapter.inject,
        rank=request.lora_rank,
        alpha=request.lora_rank,
        dropout=request.lora_dropout,
    )
    with torch.device("meta"):
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(dict(configs["unet"])))
        text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        vae = cast(AutoencoderKL, AutoencoderKL.from_config(dict(configs["vae"])))
        move(unet, dtype)
        move(text_encoder, dtype)
        for model in (unet, text_encoder, vae):
            model.requires_grad_(False).eval()
        parameters = inject(unet, target_modules=request.target_modules)
        if request.in_float8:
            store_in_float8(unet)
        if request.trains_text_encoder:
            parameters += inject(text_encoder, target_modules=adapter.TEXT_ENCODER_TARGETS)
    return _Models(unet, text_encoder, vae, parameters)


class MemoryEstimate:
    """The memory of a run in bytes.

    Args:
        configs: the configurations of the base's models (models.configs.read_configs).
        dtype: what the base computes in.
        on_gpu: norms then compute in float32 and the allocator leaves fewer gaps.
        cache_dir: where traced figures are kept for later starts; None for nowhere.

    Raises:
        UserError: a configuration is impossible.
    """

    def __init__(
        self,
        configs: Mapping[str, Mapping[str, Any]],
        request: MemoryRequest,
        dtype: torch.dtype,
        on_gpu: bool,
        cache_dir: Path | None = None,
    ):
        self.request, self.dtype, self.on_gpu = request, dtype, on_gpu
        self.resolution = request.resolution
        try:
            models = _build_models(configs, request, dtype)
        except CONFIGURATION_ERRORS as error:
            reason = summarize_error(error)
            raise UserError(f"The base's configuration is odd ({reason})", BASE_REMEDY) from None
        self.unet, self.text_encoder, self.vae, lora_parameters = models
        self.width = unet_config(self.unet).block_out_channels[0]
        self.vae_scale_factor = 2 ** (len(vae_config(self.vae).block_out_channels) - 1)
        self.trained_models: list[nn.Module] = [self.unet]
        resident: list[nn.Module] = [self.unet]
        if request.trains_text_encoder:
            self.trained_models.append(self.text_encoder)
        if request.encodes_text or request.trains_text_encoder:
            resident.append(self.text_encoder)
        if request.encodes_images:
            resident.append(self.vae)
        numbers = sum(parameter.numel() for parameter in lora_parameters)
        self.gradients = numbers * FLOAT32
        self.moments = int(OPTIMIZERS[request.optimizer] * numbers * FLOAT32)
        # The best LoRA is kept on the CPU.
        num_copies = int(request.keeps_average) + int(request.keeps_best and not on_gpu)
        self.copies = num_copies * numbers * FLOAT32
        self.weights = tensor_bytes(*resident)
        # The VAE comes back for sample images if the run has let it go.
        self.reloaded_vae = 0 if request.encodes_images else tensor_bytes(self.vae)
        if on_gpu and dtype != torch.float32:
            norms_in_float32(self.unet, self.text_encoder)
        settings = [configs, asdict(request), dtype, on_gpu]
        self._traces = TraceCache(cache_dir, settings)

    @cached_property
    def _fake_models(self) -> FakeModels:
        """Made for the first trace: where all figures are stored, it is not needed."""
        return FakeModels(self.unet, self.text_encoder, self.vae)

    def _step_of_one_image(self, checkpointing: bool) -> int:
        name = f"step, checkpointing {checkpointing}"
        return self._traces.get(name, lambda: self._trace_step(checkpointing))

    def _decoding_of_one_image(self, resolution: int) -> int:
        name = f"decoding {resolution} px"
        return self._traces.get(name, lambda: self._trace_decoding(resolution))

    def _encoding_of_one_image(self, resolution: int) -> int:
        name = f"encoding {resolution} px"
        return self._traces.get(name, lambda: self._trace_encoding(resolution))

    def training_peak(
        self, batch_size: int, checkpointing: bool, resolution: int | None = None
    ) -> int:
        """Peak of a training step with batch_size images at once."""
        working = self.activations(batch_size, checkpointing, resolution)
        if self.request.encodes_images:
            # Before the UNet's activations exist, and one image at a time if need be.
            encoding = self._encoding_of_one_image(resolution or self.resolution)
            working = max(working, encoding)
        return self.weights + self.gradients + self.moments + self.copies + working

    def activations(
        self, batch_size: int, checkpointing: bool, resolution: int | None = None
    ) -> int:
        """What forward and backward pass keep beyond the weights.

        One image of the run's resolution is traced, and the rest is in proportion to the pixels,
        within 4 % for Stable Diffusion 1.5 from 256 px to 768 px: attention stores no matrix of
        all pairs.
        """
        overhead = 1.0 if self.on_gpu else RESIDENT
        pixels = ((resolution or self.resolution) / self.resolution) ** 2
        return int(self._step_of_one_image(checkpointing) * overhead * batch_size * pixels)

    def validation_peak(self, tiled: bool) -> int:
        """Peak of the sample images, for which the gradients are gone; 0 if there are none."""
        if not self.request.num_validation_images:
            return 0
        working = max(self.decoding(tiled), self.reloaded_vae + self._guided_pass)
        return self.weights + self.moments + self.copies + working

    def decoding(self, tiled: bool) -> int:
        """The VAE's decoding of one sample image in float32, beyond weights that are in memory
        already."""
        image = self.resolution**2 * 3 * FLOAT32
        if tiled:
            return self.reloaded_vae + self._decoding_of_one_image(self.vae_tile) + 2 * image
        return self.reloaded_vae + self._decoding_of_one_image(self.resolution)

    @property
    def vae_tile(self) -> int:
        """Side in pixels of the VAE's tiles if sample images are tiled: the VAE's own, or half of
        an image's."""
        return tile_side(self.vae.tile_sample_min_size, self.resolution, self.vae_scale_factor)

    def summary(self, batch_size: int, checkpointing: bool, tiled: bool) -> str:
        """The parts of the peak in GB. Activations and VAE decoding never exist at the same
        time."""
        has_images = self.request.num_validation_images > 0
        parts = {
            "weights": self.weights,
            "activations": self.activations(batch_size, checkpointing),
            "gradients and optimizer": self.gradients + self.moments,
            "VAE decoding": self.decoding(tiled) if has_images else 0,
        }
        if self.copies:
            parts["copies of the LoRA"] = self.copies
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())

    def _trace_step(self, checkpointing: bool) -> int:
        for model in self.trained_models:
            model.train()
        if checkpointing:
            checkpoint_gradients(self.trained_models)
        try:
            return self._fake_models.peak(self._train_on_one_image)
        finally:
            for model in self.trained_models:
                model.zero_grad()
                model.eval()
                if checkpointing:
                    keep_activations(model)

    def _train_on_one_image(self) -> None:
        noisy, prompt_embeds, timesteps = self._inputs(1)
        with self._autocast():
            if self.request.encodes_text or self.request.trains_text_encoder:
                input_ids = torch.zeros(prompt_embeds.shape[:2], dtype=torch.int64)
                prompt_embeds = self.text_encoder(input_ids)[0].to(self.dtype)
            noise_pred = predict_noise(self.unet, noisy, timesteps, prompt_embeds).float()
        diffusion.loss(noise_pred, torch.empty(noisy.shape)).backward()

    def _trace_encoding(self, resolution: int) -> int:
        @torch.no_grad()
        def encode() -> None:
            self.vae.encode(cast(torch.FloatTensor, torch.empty(1, 3, resolution, resolution)))

        return self._fake_models.peak(encode)

    def _trace_decoding(self, resolution: int) -> int:
        side = resolution // self.vae_scale_factor

        @torch.no_grad()
        def decode() -> None:
            channels = vae_config(self.vae).latent_channels
            decode_latents(self.vae, torch.empty(1, channels, side, side))

        return self._fake_models.peak(decode)

    @property
    def _guided_pass(self) -> int:
        """The UNet's activations for a batch of sample images, each with and without prompt."""
        return self._traces.get("guided pass", self._trace_guided_pass)

    def _trace_guided_pass(self) -> int:
        batch_size = runtime.default_batch_size(self.resolution, self.resolution)
        rows = 2 * min(self.request.num_validation_images, batch_size)

        @torch.no_grad()
        def predict() -> None:
            noisy, prompt_embeds, timesteps = self._inputs(rows)
            with self._autocast():
                predict_noise(self.unet, noisy, timesteps, prompt_embeds)

        return self._fake_models.peak(predict)

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, prompt_embeds and timesteps of so many rows."""
        side, text_config = self.resolution // self.vae_scale_factor, self.text_encoder.config
        channels = unet_config(self.unet).in_channels
        noisy = torch.empty(rows, channels, side, side, dtype=self.dtype)
        positions, width = text_config.max_position_embeddings, text_config.hidden_size
        prompt_embeds = torch.empty(rows, positions, width, dtype=self.dtype)
        return noisy, prompt_embeds, torch.zeros(rows, dtype=torch.int64)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)


def gigabytes(size: float) -> str:
    """Bytes in GB with one decimal, two if it is little."""
    return f"{size / GB:.2f}" if size < GB / 10 else f"{size / GB:.1f}"

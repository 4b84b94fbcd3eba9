"""What a run will need, before it starts: one training step and one sample image, traced without
weights or pictures.

GB are 2**30 bytes, as with cards. What is counted are the storages of tensors without contents, on
a CPU with what its allocator adds. The CUDA context, the libraries' workspaces and the allocator's
fragments come on top; so memory_plan.py takes measures from runtime.USABLE of the memory on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel

from megaman import runtime
from megaman.errors import UserError, summarize_error
from megaman.lora import adapter
from megaman.models.base import CONFIGURATION_ERRORS
from megaman.models.configs import BASE_REMEDY
from megaman.training import loss as diffusion
from megaman.training.compute import checkpoint_gradients, keep_activations

GB = 2**30
# Bytes that are resident on a CPU for each of activations: the allocator's gaps and oneDNN's
# scratch, by memory.py.
RESIDENT = 1.5
FLOAT32 = 4  # bytes of a number of the LoRA, of its gradient, and of each of AdamW's two moments


class _LiveStorages(TorchDispatchMode):
    """Follows the bytes of the storages that operators make, and their peak; what was there before
    does not count."""

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in before})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, torch.Tensor)
                and (storage := leaf.untyped_storage()) not in self._known
            ):
                self._known[storage] = None
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False
        return result

    def _gone(self, size: int) -> None:
        self.live -= size


class Hollow:
    """Models without contents. They come from the device meta, and from here on are as if on the
    CPU: a torch without CUDA cannot differentiate tensors that say they are on a card."""

    def __init__(self, *models: nn.Module):
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._models = models
        with self._mode:
            for module in [module for model in models for module in model.modules()]:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    empty = torch.empty_like(parameter, device="cpu")
                    setattr(
                        module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    )
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))

    def peak(self, compute: Callable[[], object]) -> int:
        """Bytes at the peak of compute beyond the models' own; all tensors that it makes are
        without contents."""
        before = [
            tensor for model in self._models for tensor in (*model.parameters(), *model.buffers())
        ]
        storages = _LiveStorages(before)
        with self._mode, storages:
            compute()
        return storages.peak


def parameter_bytes(*models: nn.Module) -> int:
    """Bytes of the models' parameters and buffers."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def norms_in_float32(*models: nn.Module) -> None:
    """Have the models' norms compute in float32 and hand float32 on, as CUDA's autocast does, and
    the CPU's does not.

    In half precision they are a tenth of a training step's memory.
    """
    for module in [module for model in models for module in model.modules()]:
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.float()
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(tensor.float() for tensor in inputs)
            )


class Plan:
    """The memory that a run takes, in bytes, from its base's configurations (read_configs).

    size is the pictures' side in pixels; dtype what the base computes in; card whether it runs on
    one, where norms compute in float32 and the allocator leaves fewer gaps; rank, targets and
    dropout are the LoRA's; images is the number of sample images. The text encoder is there where
    it reads at every step, the VAE for sample images, or with encodes at every step. Raises
    UserError for a configuration that says something impossible.
    """

    def __init__(
        self,
        configs: Mapping[str, Mapping[str, Any]],
        dtype: torch.dtype,
        card: bool,
        *,
        size: int,
        rank: int,
        targets: Sequence[str],
        dropout: float = 0.0,
        reads: bool = False,
        trains_text_encoder: bool = False,
        encodes: bool = False,
        images: int = 4,
    ):
        self.size, self.dtype, self.card, self.images = size, dtype, card, images
        self.reads = reads or trains_text_encoder
        add_lora = partial(adapter.inject, rank=rank, alpha=rank, dropout=dropout)
        try:
            with torch.device("meta"):
                self.unet = UNet2DConditionModel.from_config(dict(configs["unet"])).to(dtype)
                self.text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).to(
                    dtype
                )
                self.vae = AutoencoderKL.from_config(dict(configs["vae"]))
                for model in (self.unet, self.text_encoder, self.vae):
                    model.requires_grad_(False).eval()
                trained = add_lora(self.unet, target_modules=targets)
                if trains_text_encoder:
                    trained += add_lora(
                        self.text_encoder, target_modules=adapter.TEXT_ENCODER_TARGETS
                    )
        except CONFIGURATION_ERRORS as error:
            raise UserError(
                f"The base's configuration is odd ({summarize_error(error)})", BASE_REMEDY
            ) from None
        self.width = self.unet.config.block_out_channels[0]
        self.in_training = [self.unet, self.text_encoder] if trains_text_encoder else [self.unet]
        self.factor = 2 ** (
            len(self.vae.config.block_out_channels) - 1
        )  # pixels a side of one latent cell
        numbers = sum(parameter.numel() for parameter in trained)
        self.gradients, self.moments = numbers * FLOAT32, 2 * numbers * FLOAT32
        beside = [self.text_encoder] * self.reads + [self.vae] * encodes
        self.encodes, self.weights = encodes, parameter_bytes(self.unet, *beside)  # all the time
        self.comes_back = 0 if encodes else parameter_bytes(self.vae)  # for sample images
        if card and dtype != torch.float32:
            norms_in_float32(self.unet, self.text_encoder)
        self._hollow = Hollow(self.unet, self.text_encoder, self.vae)
        self._one_picture, self._one_image = cache(self._trace_step), cache(self._trace_decoding)
        self._one_encoding = cache(self._trace_encoding)

    def activations(self, batch: int, checkpointing: bool, size: int | None = None) -> int:
        """What forward and backward pass keep beyond the weights; size pixels a side instead of the
        run's own.

        One picture of the run's size is traced, and the rest is in proportion to the pixels, within
        4 % for Stable Diffusion 1.5 from 256 px to 768 px: attention keeps no table of all pairs.
        """
        more = 1.0 if self.card else RESIDENT
        return int(
            self._one_picture(checkpointing) * more * batch * ((size or self.size) / self.size) ** 2
        )

    def _trace_step(self, checkpointing: bool) -> int:
        for model in self.in_training:
            model.train()
        if checkpointing:
            checkpoint_gradients(self.in_training)

        def step() -> None:
            noisy, states, timesteps = self._inputs(1)
            with self._autocast():
                if self.reads:
                    states = self.text_encoder(torch.zeros(states.shape[:2], dtype=torch.int64))[
                        0
                    ].to(self.dtype)
                noise_pred = self.unet(
                    noisy, timesteps, encoder_hidden_states=states
                ).sample.float()
            diffusion.loss(noise_pred, torch.empty(noisy.shape)).backward()

        try:
            return self._hollow.peak(step)
        finally:
            for model in self.in_training:
                model.zero_grad()
                model.eval()
                if checkpointing:
                    keep_activations(model)

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, text states and timesteps of so many rows."""
        cells, text = self.size // self.factor, self.text_encoder.config
        noisy = torch.empty(rows, self.unet.config.in_channels, cells, cells, dtype=self.dtype)
        states = torch.empty(rows, text.max_position_embeddings, text.hidden_size, dtype=self.dtype)
        return noisy, states, torch.zeros(rows, dtype=torch.int64)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)

    def training(self, batch: int, checkpointing: bool, size: int | None = None) -> int:
        """Peak of a training step with batch pictures at once."""
        most = self.activations(batch, checkpointing, size)
        if (
            self.encodes
        ):  # before the UNet's own activations are there, a picture at a time if need be
            most = max(most, self._one_encoding(size or self.size))
        return self.weights + self.gradients + self.moments + most

    @property
    def tile(self) -> int:
        """Side in pixels of the VAE's tiles, where it draws in tiles: the VAE's own, or half of an
        image's."""
        return (
            max(min(self.vae.tile_sample_min_size, self.size // 2) // self.factor, 1) * self.factor
        )

    def decoding(self, tiled: bool) -> int:
        """The VAE's decoding of one sample image, in float32, beyond weights that are there
        already."""
        image = self.size**2 * 3 * FLOAT32
        return self.comes_back + (
            self._one_image(self.tile) + 2 * image if tiled else self._one_image(self.size)
        )

    def _trace_encoding(self, side: int) -> int:

        @torch.no_grad()
        def encode() -> None:
            self.vae.encode(torch.empty(1, 3, side, side))

        return self._hollow.peak(encode)

    def _trace_decoding(self, side: int) -> int:

        @torch.no_grad()
        def decode() -> None:
            self.vae.decode(
                torch.empty(1, self.vae.config.latent_channels, *[side // self.factor] * 2)
            )

        return self._hollow.peak(decode)

    @cached_property
    def guided_pass(self) -> int:
        """The UNet's activations over the sample images drawn at once, each with and without
        prompt."""
        rows = 2 * min(self.images, runtime.default_batch_size(self.size, self.size))

        @torch.no_grad()
        def draw() -> None:
            noisy, states, timesteps = self._inputs(rows)
            with self._autocast():
                self.unet(noisy, timesteps, encoder_hidden_states=states)

        return self._hollow.peak(draw)

    def drawing(self, tiled: bool) -> int:
        """Peak of the sample images, for which the gradients are gone; 0 where none are drawn."""
        if not self.images:
            return 0
        return (
            self.weights
            + self.moments
            + max(self.decoding(tiled), self.comes_back + self.guided_pass)
        )

    def in_words(self, batch: int, checkpointing: bool, tiled: bool) -> str:
        """The peak's parts in GB. Activations and the VAE's decoding are not there at the same
        time."""
        parts = {
            "weights": self.weights,
            "activations": self.activations(batch, checkpointing),
            "gradients and optimizer": self.gradients + self.moments,
            "VAE decoding": self.decoding(tiled) if self.images else 0,
        }
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())


def gigabytes(size: float) -> str:
    """Bytes in GB as people read them, a small number with one more digit."""
    return f"{size / GB:.2f}" if size < GB / 10 else f"{size / GB:.1f}"

"""Drawing batch by batch with a base and its LoRAs, and how that fits into the memory at hand: how
many images at once, the VAE in tiles, the models one after another. Text states are kept by
prompt."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megaman import runtime
from megaman.errors import UserError
from megaman.lora import adapter
from megaman.models import text_encoding
from megaman.runtime import USABLE
from megaman.sampling import denoise
from megaman.sampling.jobs import Job

if TYPE_CHECKING:
    from PIL import Image

    from megaman.config.samplers import Sampler
    from megaman.models.base import Base
    from megaman.runtime import Placement

# Peak bytes of one pass, in bytes of the widest layer's activations. Measured on Stable Diffusion
# 1.5's shape in float32 on a CPU: the UNet 37 with two rows of 512 px, the VAE's decoder 7.6 at 512
# px.
UNET_PASS, VAE_PASS = 40, 8

MOST_STATES = 1000  # prompts whose states are kept: 0.24 MB each with Stable Diffusion 1.5


@dataclass
class Room:
    """How images are drawn: so many pixels at once, the VAE in tiles, the models taking turns on
    the device.

    largest are the pixels of the largest image there is to draw.
    """

    pixels: int
    largest: int
    tiling: bool = False
    turns: bool = False

    def at_once(self, height: int, width: int) -> int:
        """How many images of a size are drawn together."""
        return max(1, self.pixels // (height * width))

    def tighten(self) -> None:
        """The next measure against too little memory; raises UserError where there is none left."""
        if self.pixels > self.largest:
            self.pixels = max(1, self.pixels // self.largest // 2) * self.largest
        elif not self.tiling:
            self.tiling = True
        elif not self.turns:
            self.turns = True
        else:
            raise UserError(
                "Even one image at a time needs more memory than there is",
                "Lower --height and --width",
            )

    def __str__(self) -> str:
        measures = ["the VAE in tiles"] * self.tiling + [
            "the models one after another on the device"
        ] * self.turns
        return ", ".join([f"{max(1, self.pixels // self.largest)} at once", *measures])


def pass_sizes(
    unet: torch.nn.Module, vae: torch.nn.Module, pixels: int, factor: int
) -> tuple[int, int, int]:
    """Bytes that drawing takes beyond the weights: an image's two rows through the UNet, an image
    of so many pixels out of the VAE, and one tile out of it. factor is the VAE's pixels a side of
    one latent cell."""
    drawing = (
        2
        * pixels
        // factor**2
        * unet.config.block_out_channels[0]
        * unet.dtype.itemsize
        * UNET_PASS
    )
    pixel = vae.config.block_out_channels[0] * vae.dtype.itemsize * VAE_PASS
    return drawing, pixels * pixel, vae.tile_sample_min_size**2 * pixel


def make_room(
    free: int,
    weights: tuple[int, int, int],
    passes: tuple[int, int, int],
    largest: int,
    batch: int,
    can_wait: bool,
) -> Room:
    """The least that has to be given up so that drawing fits into free bytes, before any weight is
    on the device.

    weights are the bytes of UNet, VAE and text encoder; passes those of an image in the UNet, out
    of the VAE, and out of the VAE in tiles; largest the pixels of the largest image, batch how many
    of it are wished for at once; can_wait says whether a model that waits leaves the device, as it
    cannot where there is no other. Where nothing fits, the smallest room is given all the same:
    free memory is an estimate, too.
    """
    unet, vae, text = weights
    drawing, decoding, tile = passes

    def fits(room: Room) -> bool:
        draw = room.pixels // largest * drawing
        decode = min(decoding, tile) if room.tiling else decoding
        together = unet + vae + text + max(draw, decode)
        return (max(unet + draw, vae + decode, text) if room.turns else together) <= free * USABLE

    rooms = [
        Room(at_once * largest, largest, tiling, turns)
        for turns in ([False, True] if can_wait else [False])
        for tiling in (False, True)
        for at_once in dict.fromkeys(
            math.ceil(batch / 2**power) for power in range(batch.bit_length() + 1)
        )
    ]
    return next(filter(fits, rooms), rooms[-1])


class Drawer:
    """The models in their places, with LoRAs fused or not. The room gets tighter where memory runs
    out."""

    def __init__(
        self,
        base: Base,
        fused: adapter.FusedLoras | None,
        placement: Placement,
        room: Room,
        sampler: Sampler,
        clip_skip: int,
    ):
        self.base, self.placement, self.room, self.sampler, self.clip_skip = (
            base,
            placement,
            room,
            sampler,
            clip_skip,
        )
        self._fused = fused
        self._states: dict[tuple[bool, str], torch.Tensor] = {}
        base.unet.to(dtype=placement.dtype)
        base.text_encoder.to(dtype=placement.dtype)

    def set_scales(self, strengths: dict[int, float]) -> None:
        """The LoRAs at work from here on by their numbers, each with its strength."""
        if self._fused:
            self._fused.set_scales(strengths)
        else:
            adapter.set_scales([self.base.unet, self.base.text_encoder], strengths)
        self.forget()

    def forget(self) -> None:
        """Encode every prompt anew from here on."""
        self._states = {}

    def chunks(self, job: Job) -> int:
        """How many runs of the text encoder's length the longer of a job's two prompts takes."""
        return max(
            text_encoding.count_chunks(self.base.tokenizer, text)
            for text in (job.prompt, job.negative_prompt)
        )

    def draw(
        self, batch: Sequence[Job], on_step: Callable[[], object], plain: bool = False
    ) -> list[tuple[Job, Sequence[Job], Image.Image]]:
        """Each job with its image and the jobs that it was drawn together with: fewer than the
        batch where memory is short. The jobs have the same size, steps and guidance. With plain the
        LoRAs are left out."""
        drawn: list[tuple[Job, Sequence[Job], Image.Image]] = []

        def next_part() -> list[tuple[Job, Sequence[Job], Image.Image]]:
            part = batch[len(drawn) :][: self.room.at_once(batch[0].height, batch[0].width)]
            images = self._draw(part, on_step, plain)
            return [(job, part, image) for job, image in zip(part, images, strict=True)]

        off = (
            adapter.lora_disabled(self.base.unet, self.base.text_encoder)
            if plain
            else contextlib.nullcontext()
        )
        with off:
            while len(drawn) < len(batch):
                drawn += runtime.retry_on_oom(next_part, self.room.tighten)
        return drawn

    def _draw(
        self, part: Sequence[Job], on_step: Callable[[], object], plain: bool
    ) -> list[Image.Image]:
        job, empty = part[0], self._states_of(plain, "")
        rows = [
            [self._states_of(plain, prompt) for prompt in prompts]
            for prompts in ([each.prompt for each in part], [each.negative_prompt for each in part])
        ]
        chunks = max(len(states) // len(empty) for row in rows for states in row)
        text, negative = (
            torch.stack([text_encoding.pad_chunks(states, empty, chunks) for states in row])
            for row in rows
        )
        size = job.height // self.base.vae_scale_factor, job.width // self.base.vae_scale_factor
        latents = denoise.draw_latents(
            self._on_device(self.base.unet),
            denoise.make_sampler(self.base.noise_scheduler, self.sampler),
            text,
            negative,
            [each.seed for each in part],
            size,
            job.steps,
            job.guidance,
            on_step,
        )
        self.base.vae.use_tiling = self.room.tiling
        return denoise.decode(self._on_device(self.base.vae), latents)

    def _states_of(self, plain: bool, prompt: str) -> torch.Tensor:
        if len(self._states) > MOST_STATES:
            self._states = {}
        if (plain, prompt) not in self._states:
            text_encoder = self._on_device(self.base.text_encoder)
            states = text_encoding.encode_prompt(
                text_encoder, self.base.tokenizer, prompt, self.clip_skip
            )
            self._states[plain, prompt] = states
        return self._states[plain, prompt]

    def _on_device(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, moved to the device; the others leave it where they take turns."""
        if self.room.turns:
            for other in (self.base.unet, self.base.vae, self.base.text_encoder):
                if other is not model:
                    other.to("cpu")
        return model.to(self.placement.device)

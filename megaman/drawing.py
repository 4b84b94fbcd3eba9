"""Drawing batch by batch with a base and its LoRAs, in the room that there is; text states are kept by prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from megaman import lora, memory, sample, text_states
from megaman.jobs import Job
from megaman.room import Room

if TYPE_CHECKING:
    from PIL import Image

    from megaman.base import Base
    from megaman.placement import Placement
    from megaman.samplers import Sampler

MOST_STATES = 1000  # prompts whose states are kept: 0.24 MB each with Stable Diffusion 1.5


class Drawer:
    """The models in their places, with LoRAs fused or not. The room gets tighter where memory runs out."""

    def __init__(
        self, base: Base, fused: lora.Fused | None, placement: Placement, room: Room, sampler: Sampler, clip_skip: int
    ):
        self.base, self.placement, self.room, self.sampler, self.clip_skip = base, placement, room, sampler, clip_skip
        self._fused = fused
        self._states: dict[tuple[bool, str], torch.Tensor] = {}
        base.unet.to(dtype=placement.dtype)
        base.text_encoder.to(dtype=placement.dtype)

    def set_strengths(self, strengths: dict[int, float]) -> None:
        """The LoRAs at work from here on by their numbers, each with its strength."""
        if self._fused:
            self._fused.set_strengths(strengths)
        else:
            lora.set_strengths([self.base.unet, self.base.text_encoder], strengths)
        self.forget()

    def forget(self) -> None:
        """Encode every prompt anew from here on."""
        self._states = {}

    def chunks(self, job: Job) -> int:
        """How many runs of the text encoder's length the longer of a job's two prompts takes."""
        return max(text_states.count_chunks(self.base.tokenizer, text) for text in (job.prompt, job.negative_prompt))

    def draw(
        self, batch: Sequence[Job], on_step: Callable[[], object], plain: bool = False
    ) -> list[tuple[Job, Sequence[Job], Image.Image]]:
        """Each job with its image and the jobs that it was drawn together with: fewer than the batch where memory is
        short. The jobs have the same size, steps and guidance. With plain the LoRAs are left out."""
        drawn: list[tuple[Job, Sequence[Job], Image.Image]] = []

        def next_part() -> list[tuple[Job, Sequence[Job], Image.Image]]:
            part = batch[len(drawn) :][: self.room.at_once(batch[0].height, batch[0].width)]
            images = self._draw(part, on_step, plain)
            return [(job, part, image) for job, image in zip(part, images, strict=True)]

        off = lora.switched_off(self.base.unet, self.base.text_encoder) if plain else contextlib.nullcontext()
        with off:
            while len(drawn) < len(batch):
                drawn += memory.until_it_fits(next_part, self.room.tighten)
        return drawn

    def _draw(self, part: Sequence[Job], on_step: Callable[[], object], plain: bool) -> list[Image.Image]:
        job, empty = part[0], self._states_of(plain, "")
        rows = [
            [self._states_of(plain, prompt) for prompt in prompts]
            for prompts in ([each.prompt for each in part], [each.negative_prompt for each in part])
        ]
        chunks = max(len(states) // len(empty) for row in rows for states in row)
        text, negative = (
            torch.stack([text_states.pad_chunks(states, empty, chunks) for states in row]) for row in rows
        )
        size = job.height // self.base.vae_factor, job.width // self.base.vae_factor
        latents = sample.draw_latents(
            self._on_device(self.base.unet), sample.make_sampler(self.base.scheduler, self.sampler), text, negative,
            [each.seed for each in part], size, job.steps, job.guidance, on_step,
        )  # fmt: skip
        self.base.vae.use_tiling = self.room.tiling
        return sample.decode(self._on_device(self.base.vae), latents)

    def _states_of(self, plain: bool, prompt: str) -> torch.Tensor:
        if len(self._states) > MOST_STATES:
            self._states = {}
        if (plain, prompt) not in self._states:
            text_encoder = self._on_device(self.base.text_encoder)
            states = text_states.encode_prompt(text_encoder, self.base.tokenizer, prompt, self.clip_skip)
            self._states[plain, prompt] = states
        return self._states[plain, prompt]

    def _on_device(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, moved to the device; the others leave it where they take turns."""
        if self.room.turns:
            for other in (self.base.unet, self.base.vae, self.base.text_encoder):
                if other is not model:
                    other.to("cpu")
        return model.to(self.placement.device)

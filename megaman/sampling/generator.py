"""Generation batch by batch, with a base and its LoRAs. Prompt embeddings are kept by prompt."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from megaman import runtime
from megaman.models import text_encoding
from megaman.models.typed import move
from megaman.models.vae_tiling import enable_vae_tiling, tile_side
from megaman.sampling import denoise
from megaman.sampling.denoise import PromptEmbeds, SamplingSettings
from megaman.sampling.jobs import Job, LoraVariant, PendingBatch, make_batches
from megaman.sampling.pixel_grid import PixelGrid
from megaman.sampling.records import Recorder, RunSettings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL import Image

    from megaman.config.samplers import Sampler
    from megaman.lora.stack import LoraStack
    from megaman.models.base import Base
    from megaman.runtime import ComputeSettings
    from megaman.sampling.limits import SamplingLimits

MAX_CACHED_PROMPTS = 1000  # 0.24 MB each with Stable Diffusion 1.5
# Images at once if batches run in parallel. More are not faster, and the number does not depend on
# the machine, so that equal commands give equal bits.
PARALLEL_BATCH_SIZE = 3


@dataclass(frozen=True)
class GeneratedImage:
    """An image with its job and with what its last bits depend on: the jobs of its batch, and the
    side in pixels of the VAE's tiles, 0 for none."""

    job: Job
    batch: Sequence[Job]
    image: Image.Image
    vae_tile: int


@dataclass(frozen=True)
class Sampling:
    """What all images of a run share: the sampler, A1111's clip skip, how many small batches run in
    parallel (None: large batches, one by one), and the grid of the pixel art next to each."""

    sampler: Sampler
    clip_skip: int
    workers: int | None = None
    pixel_grid: PixelGrid | None = None


class _StoppedError(Exception):
    """A batch stops because one that runs in parallel failed."""


class ImageGenerator:
    """A base with its LoRAs on a device; the limits get tighter when memory runs out."""

    def __init__(
        self,
        base: Base,
        loras: LoraStack,
        compute: ComputeSettings,
        limits: SamplingLimits,
        sampling: Sampling,
    ):
        self.base, self.loras, self.compute = base, loras, compute
        self.limits, self.sampling = limits, sampling
        self._embeds: dict[tuple[bool, str], torch.Tensor] = {}
        self._variant: LoraVariant | None = None
        self._stop = threading.Event()
        self._progress_lock, self._decode_lock = threading.Lock(), threading.Lock()
        self._own_tile = base.vae.tile_sample_min_size
        move(base.unet, dtype=compute.dtype)
        move(base.text_encoder, dtype=compute.dtype)
        self.recorder = self._make_recorder()

    def _make_recorder(self) -> Recorder:
        """What makes the records of this generator's images."""
        grid = self.sampling.pixel_grid or PixelGrid(0, ())
        settings = RunSettings(
            scheduler=self.sampling.sampler.name,
            clip_skip=self.sampling.clip_skip,
            base=self.base.name,
            fused=self.loras.is_fused,
            device=self.compute.device.type,
            dtype=str(self.compute.dtype).removeprefix("torch."),
            versions=runtime.package_versions(),
            memory_format=self.compute.memory_format,
            threads=torch.get_num_threads(),
            pixel_art=grid.cells,
            palette=list(grid.palette) or None,
        )
        return Recorder(settings, self.loras.hashes)

    def summary(self, scale: float, batches: Sequence[Sequence[Job]]) -> list[str]:
        """The lines about the LoRAs at a scale and the device, for these batches."""
        largest = max(map(len, batches))
        device = runtime.device_lines(self.compute, self.limits.summary(largest))
        return [*self.loras.summary(scale), *device]

    def set_variant(self, variant: LoraVariant) -> None:
        """Generate with this variant's LoRAs from here on."""
        if variant is not self._variant:
            self.loras.set_scales(variant.scales)
            self._embeds = {}
            self._variant = variant

    def make_batches(self, jobs: Sequence[Job], batch_size: int | None) -> list[list[Job]]:
        """The jobs in batches of at most batch_size, None for as many as are fast and fit."""
        largest = batch_size or len(jobs)
        if batch_size is None and self.sampling.workers is not None:
            largest = PARALLEL_BATCH_SIZE

        def size(job: Job) -> int:
            return min(largest, self.limits.batch_size(job.height, job.width))

        return make_batches(jobs, size, self._count_chunks)

    def _count_chunks(self, job: Job) -> int:
        """How many runs of the text encoder the longer of a job's two prompts takes."""
        return max(
            text_encoding.count_chunks(self.base.tokenizer, prompt)
            for prompt in (job.prompt, job.negative_prompt)
        )

    def parallel_groups(self, pending: Sequence[PendingBatch]) -> list[list[PendingBatch]]:
        """The batches in groups that run in parallel, each of one variant."""
        groups = []
        size = self.sampling.workers or 1
        for _, batches in groupby(pending, key=lambda item: id(item.variant)):
            alike = list(batches)
            groups += [alike[start : start + size] for start in range(0, len(alike), size)]
        return groups

    def generate(
        self,
        batches: Sequence[Sequence[Job]],
        on_progress: Callable[[float], object],
        without_lora: bool = False,
    ) -> list[GeneratedImage]:
        """The images of all batches, in order; batches run in parallel if the run has workers.

        on_progress gets the number of images, a fraction, that each step completes. The jobs of a
        batch share size, steps and guidance scale. An image's batch is smaller than
        the one it was given in if memory was short.
        """
        disabled = self.loras.disabled() if without_lora else contextlib.nullcontext()
        generate = partial(self._generate_batch, on_progress=on_progress, without_lora=without_lora)
        with disabled:
            if self.sampling.workers is None or len(batches) == 1:
                return flatten(map(generate, batches))
            for batch in batches:  # fills the cache, since the text encoder runs in this thread
                self._batch_embeds(batch, without_lora)
            return flatten(self._in_parallel(generate, batches))

    def _in_parallel(
        self,
        generate: Callable[[Sequence[Job]], list[GeneratedImage]],
        batches: Sequence[Sequence[Job]],
    ) -> list[list[GeneratedImage]]:
        def run(batch: Sequence[Job]) -> list[GeneratedImage]:
            try:
                return generate(batch)
            except BaseException:
                self._stop.set()
                raise

        with ThreadPoolExecutor(self.sampling.workers) as pool:
            futures = [pool.submit(run, batch) for batch in batches]
            try:
                wait(futures)
            except KeyboardInterrupt:
                self._stop.set()  # else leaving the pool would wait for the end of each batch
                raise
        errors = [error for future in futures if (error := future.exception())]
        for error in errors:
            if not isinstance(error, _StoppedError):
                raise error
        return [future.result() for future in futures]

    def _generate_batch(
        self, batch: Sequence[Job], on_progress: Callable[[float], object], without_lora: bool
    ) -> list[GeneratedImage]:
        images: list[GeneratedImage] = []

        def next_part() -> list[GeneratedImage]:
            size = self.limits.batch_size(batch[0].height, batch[0].width)
            part = batch[len(images) : len(images) + size]
            return self._generate_at_once(part, on_progress, without_lora)

        while len(images) < len(batch):
            images += runtime.retry_on_oom(next_part, self.limits.reduce)
        return images

    def _generate_at_once(
        self, jobs: Sequence[Job], on_progress: Callable[[float], object], without_lora: bool
    ) -> list[GeneratedImage]:
        embeds = self._batch_embeds(jobs, without_lora)
        first = jobs[0]
        settings = SamplingSettings(
            height=first.height,
            width=first.width,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            sampler=self.sampling.sampler,
        )
        self._move_to_device(self.base.unet)
        seeds = [job.seed for job in jobs]
        unet_calls = denoise.count_unet_calls(
            self.base.noise_scheduler, settings.sampler, settings.num_inference_steps
        )

        def next_step() -> None:
            if self._stop.is_set():
                raise _StoppedError
            with self._progress_lock:
                on_progress(len(jobs) / unet_calls)

        latents = denoise.generate_latents(self.base, embeds, seeds, settings, next_step)
        vae_tile = self._vae_tile(first.height * first.width)
        self._move_to_device(self.base.vae)
        with self._decode_lock if vae_tile else contextlib.nullcontext():  # the tile is the VAE's
            enable_vae_tiling(self.base.vae, vae_tile)
            images = denoise.decode(self.base.vae, latents)
        return [
            GeneratedImage(job, jobs, image, vae_tile)
            for job, image in zip(jobs, images, strict=True)
        ]

    def _vae_tile(self, pixels: int) -> int:
        """Side of the VAE's tiles for an image of so many pixels; 0 if it is decoded as a whole."""
        if not self.limits.tiling:
            return 0
        return tile_side(self._own_tile, math.isqrt(pixels), self.base.vae_scale_factor)

    def _batch_embeds(self, jobs: Sequence[Job], without_lora: bool) -> PromptEmbeds:
        """The embeddings of the jobs' prompts, all brought to the length of the longest."""
        empty = self._prompt_embeds(without_lora, "")
        positive = [self._prompt_embeds(without_lora, job.prompt) for job in jobs]
        negative = [self._prompt_embeds(without_lora, job.negative_prompt) for job in jobs]
        return denoise.make_prompt_embeds(positive, negative, empty)

    def _prompt_embeds(self, without_lora: bool, prompt: str) -> torch.Tensor:
        key = (without_lora, prompt)
        if key not in self._embeds:
            if len(self._embeds) > MAX_CACHED_PROMPTS:
                self._embeds = {}
            self._move_to_device(self.base.text_encoder)
            self._embeds[key] = text_encoding.encode_prompt(
                self.base.text_encoder, self.base.tokenizer, prompt, self.sampling.clip_skip
            )
        return self._embeds[key]

    def _move_to_device(self, model: torch.nn.Module) -> None:
        """Move a model to the device; with offload the others leave it."""
        if self.compute.device.type == "cpu":
            return  # where they were loaded
        if self.limits.offload:
            for other in (self.base.unet, self.base.vae, self.base.text_encoder):
                if other is not model:
                    move(other, "cpu")
        move(model, self.compute.device)


def flatten(lists: Iterable[list[GeneratedImage]]) -> list[GeneratedImage]:
    """One list of the items of many."""
    return [item for items in lists for item in items]

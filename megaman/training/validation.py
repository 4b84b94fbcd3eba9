"""Generates images in the middle of training, with the LoRA as it is, within the memory left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from megaman import runtime
from megaman.config import samplers
from megaman.errors import UserError, summarize_error
from megaman.files import replacing_folder
from megaman.models.text_encoding import encode_prompt
from megaman.models.vae_tiling import enable_vae_tiling, tile_side
from megaman.sampling import denoise, png, records
from megaman.sampling.denoise import SamplingSettings, make_prompt_embeds
from megaman.sampling.jobs import Job, make_batches
from megaman.sampling.limits import unet_pass_bytes
from megaman.training.signals import StoppedError

if TYPE_CHECKING:
    from torch import nn

    from megaman.models.base import Base

NUM_INFERENCE_STEPS = 25  # as in generate_megaman.py

log = logging.getLogger(__name__)

Embeds = Mapping[str, torch.Tensor]  # prompt_embeds [chunks * positions, width] by text


@dataclass(frozen=True)
class ValidationSettings:
    """How sample images are generated: resolution is the side of the training images in pixels.

    vae_tile is the side in pixels of the VAE's tiles for them, 0 for none; keeps_vae tells whether
    the run needs the VAE between two validations; black_remedy ends the line about black images.
    """

    resolution: int
    vae_tile: int = 0
    keeps_vae: bool = False
    black_remedy: str = ""


class _TooLargeError(UserError):
    """An image needs more memory than there is."""


class Validation:
    """Generates sample images on the UNet's device.

    Args:
        prompt_embeds: those of all texts of the jobs and of ""; None if the text encoder is in
            training and has to encode them each time.
        autocast: makes the context in which the models compute.
        on_step: called after each sampling step; may raise StoppedError.
    """

    def __init__(
        self,
        base: Base,
        prompt_embeds: Embeds | None,
        settings: ValidationSettings,
        autocast: Callable[[], AbstractContextManager],
        on_step: Callable[[], None],
    ):
        self._base, self._prompt_embeds, self._settings = base, prompt_embeds, settings
        self._autocast, self._on_step = autocast, on_step
        # Width and height of images that have run out of memory together, and as a whole.
        self._one_by_one: set[tuple[int, int]] = set()
        self._tiled: set[tuple[int, int]] = set()
        self._in_session = False

    def generate(self, step: int, folder: Path, jobs: Sequence[Job]) -> dict[int, Image.Image]:
        """Generate the jobs' images after this step and write folder/00.png and so on.

        A prompt whose images do not fit into memory is skipped, and the numbers of its images with
        it. Whatever fails is logged, nothing is raised. Returns the images by number, even if they
        could not be written.
        """
        images: dict[int, Image.Image] = {}
        if not jobs:
            return images
        try:
            with self.session():
                images = self._generate_all(step, jobs)
            with replacing_folder(folder) as aside:
                for number, image in images.items():
                    info = png.text_chunks({"parameters": self._parameters(jobs[number])})
                    image.save(aside / file_name(number), pnginfo=info)
            if not all(image.getbbox() for image in images.values()):
                remedy = self._settings.black_remedy
                log.info("step %d: a sample image is completely black%s", step, remedy)
        except StoppedError:
            pass
        except Exception as error:
            reason = summarize_error(error)
            log.info("step %d: no sample images (%s); training continues", step, reason)
        return images

    def generate_images(self, jobs: Sequence[Job]) -> list[Image.Image]:
        """The images of jobs of one size; whatever fails is raised."""
        with self.session():
            with self._autocast():
                embeds = self._embed(jobs)
            return self._generate_batch(jobs, embeds)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Within this context the models are in evaluation mode, and the VAE is loaded once."""
        if self._in_session:
            yield
            return
        models = self.models_in_training
        self._in_session = True
        try:
            for model in models:
                model.eval()
            yield
        finally:
            self._in_session = False
            for model in models:
                model.train()
            self._release_vae()

    def _parameters(self, job: Job) -> str:
        values = records.a1111_values(job, samplers.DEFAULT, self._base.name)
        return png.a1111_text(job.prompt, job.negative_prompt, values)

    @property
    def models_in_training(self) -> list[nn.Module]:
        """Those with a LoRA."""
        if self._prompt_embeds is None:
            return [self._base.unet, self._base.text_encoder]
        return [self._base.unet]

    def _generate_all(self, step: int, jobs: Sequence[Job]) -> dict[int, Image.Image]:
        """The images of all jobs that fit into memory, by the job's number."""
        with self._autocast():
            embeds = self._embed(jobs)
        images: dict[int, Image.Image] = {}
        too_large: dict[Job, UserError] = {}
        first = 0
        for batch in make_batches(jobs, _batch_size, lambda job: _count_chunks(job, embeds)):
            try:
                generated = self._generate_batch(batch, embeds)
            except _TooLargeError as error:
                too_large[batch[0]] = error
            else:
                images.update(enumerate(generated, start=first))
            first += len(batch)
        if not images:
            raise next(iter(too_large.values()))
        for job, error in too_large.items():
            log.info(
                "step %d: no sample image of %.60r at %dx%d (%s); training continues",
                *(step, job.prompt, job.width, job.height, summarize_error(error)),
            )
        return images

    def _embed(self, jobs: Sequence[Job]) -> Embeds:
        if self._prompt_embeds is not None:
            return self._prompt_embeds
        texts = {"", *(job.prompt for job in jobs), *(job.negative_prompt for job in jobs)}
        encoder, tokenizer = self._base.text_encoder, self._base.tokenizer
        return {text: encode_prompt(encoder, tokenizer, text) for text in texts}

    def _generate_batch(self, batch: Sequence[Job], embeds: Embeds) -> list[Image.Image]:
        """The images of a batch, in smaller parts if memory runs out; raises _TooLargeError if one
        of them does not fit."""
        images: list[Image.Image] = []
        size = (batch[0].width, batch[0].height)
        self._refuse_too_large(batch[0])

        def next_part() -> list[Image.Image]:
            count = 1 if size in self._one_by_one else len(batch)
            return self._generate_at_once(batch[len(images) : len(images) + count], embeds)

        def reduce() -> None:
            is_large = max(size) > self._settings.resolution
            if size not in self._one_by_one:
                self._one_by_one.add(size)
            elif is_large and size not in self._tiled:
                self._tiled.add(size)
            else:
                raise _TooLargeError("one at a time they need more memory than there is")

        while len(images) < len(batch):
            images += runtime.retry_on_oom(next_part, reduce)
        return images

    def _refuse_too_large(self, job: Job) -> None:
        """Raise _TooLargeError on a CPU, where the system would end the run, for an image that is
        larger than the training images and than the memory."""
        pixels = job.width * job.height
        if self._base.device.type != "cpu" or pixels <= self._settings.resolution**2:
            return
        if unet_pass_bytes(self._base, pixels) > runtime.free_memory(self._base.device):
            raise _TooLargeError("it needs more memory than there is")

    def _generate_at_once(self, jobs: Sequence[Job], embeds: Embeds) -> list[Image.Image]:
        first = jobs[0]
        self._set_tiles((first.width, first.height))
        prompt_embeds = make_prompt_embeds(
            [embeds[job.prompt] for job in jobs],
            [embeds[job.negative_prompt] for job in jobs],
            embeds[""],
        )
        sampling = SamplingSettings(
            first.height, first.width, first.num_inference_steps, first.guidance_scale
        )
        seeds = [job.seed for job in jobs]
        with self._autocast():
            return denoise.generate_images(
                self._base, prompt_embeds, seeds, sampling, self._on_step
            )

    def _set_tiles(self, size: tuple[int, int]) -> None:
        tile = self._settings.vae_tile
        if size in self._tiled:
            own = self._settings.resolution
            tile = tile_side(own, max(size), self._base.vae_scale_factor)
        self._base.vae.disable_tiling()
        enable_vae_tiling(self._base.vae, tile)

    def _release_vae(self) -> None:
        if self._settings.keeps_vae:
            self._base.vae.disable_tiling()
        else:
            self._base.release("vae")


def file_name(number: int) -> str:
    """The file of a sample image in its step's folder."""
    return f"{number:02d}.png"


def _batch_size(job: Job) -> int:
    return runtime.default_batch_size(job.height, job.width)


def _count_chunks(job: Job, embeds: Embeds) -> int:
    """How many runs of the text encoder the longer of a job's two prompts takes."""
    return max(len(embeds[text]) for text in (job.prompt, job.negative_prompt)) // len(embeds[""])

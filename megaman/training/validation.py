"""Sample images during training: the same prompt with the same seeds, generated with the LoRA as it
is, in samples-N/."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from megaman import runtime
from megaman.errors import UserError, log_event, summarize_error
from megaman.files import replacing_folder
from megaman.models.text_encoding import encode_captions
from megaman.models.vae_tiling import enable_vae_tiling
from megaman.sampling import denoise
from megaman.sampling.denoise import PromptEmbeds, SamplingSettings
from megaman.training.history import Sample
from megaman.training.signals import StoppedError

if TYPE_CHECKING:
    from torch import nn

    from megaman.config.settings import TrainConfig
    from megaman.models.base import Base
    from megaman.models.text_encoding import CaptionEmbeddings
    from megaman.training.run import Run

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 25, 7.5  # generate_megaman.py's defaults

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationSettings:
    """What sample images to generate, one per seed, with sides of resolution pixels.

    vae_tile is the side in pixels of the VAE's tiles, 0 for none; keeps_vae tells whether the run
    needs the VAE between two validations; black_remedy ends the line about black images.
    """

    prompt: str
    seeds: Sequence[int]
    resolution: int
    vae_tile: int = 0
    keeps_vae: bool = False
    black_remedy: str = ""


class Validation:
    """Generates sample images on the UNet's device.

    Args:
        prompt_embeds: [positions, width] of the prompt and of ""; None if the text encoder is in
            training and has to encode them each time.
        autocast: makes the context in which the models compute.
        on_step: called after each sampling step; may raise StoppedError.
    """

    def __init__(
        self,
        base: Base,
        prompt_embeds: Mapping[str, torch.Tensor] | None,
        settings: ValidationSettings,
        autocast: Callable[[], AbstractContextManager],
        on_step: Callable[[], None],
    ):
        self._base, self._prompt_embeds, self._settings = base, prompt_embeds, settings
        self._autocast, self._on_step = autocast, on_step
        self._batch_size = runtime.default_batch_size(settings.resolution, settings.resolution)

    def generate(self, step: int, folder: Path) -> list[Image.Image]:
        """Generate after this step and write folder/00.png and so on.

        Whatever fails is logged, nothing is raised. Returns the images, even if they could not be
        written.
        """
        images: list[Image.Image] = []
        if not self._settings.seeds:
            return images
        models = self._models_in_training()
        try:
            enable_vae_tiling(self._base.vae, self._settings.vae_tile)
            for model in models:
                model.eval()
            images = runtime.retry_on_oom(self._generate_all, self._reduce_memory)
            with replacing_folder(folder) as aside:
                for i, image in enumerate(images):
                    image.save(aside / f"{i:02d}.png")
            if not all(image.getbbox() for image in images):
                remedy = self._settings.black_remedy
                log.info("step %d: a sample image is completely black%s", step, remedy)
        except StoppedError:
            pass
        except Exception as error:
            reason = summarize_error(error)
            log.info("step %d: no sample images (%s); training continues", step, reason)
        finally:
            for model in models:
                model.train()
            self._release_vae()
        return images

    def records(self, folder: Path) -> list[Sample]:
        """The sample images that are in a step's folder."""
        settings: dict[str, str | int | float] = {
            "steps": NUM_INFERENCE_STEPS,
            "guidance": GUIDANCE_SCALE,
        }
        files = [folder / f"{i:02d}.png" for i in range(len(self._settings.seeds))]
        return [
            Sample(f"{folder.name}/{file.name}", self._settings.prompt, seed, settings=settings)
            for file, seed in zip(files, self._settings.seeds, strict=True)
            if file.is_file()
        ]

    def _models_in_training(self) -> list[nn.Module]:
        if self._prompt_embeds is None:
            return [self._base.unet, self._base.text_encoder]
        return [self._base.unet]

    def _generate_all(self) -> list[Image.Image]:
        seeds, images = self._settings.seeds, []
        with self._autocast():
            prompt_embeds = self._embed_prompt()
        for start in range(0, len(seeds), self._batch_size):
            images += self._generate_batch(seeds[start : start + self._batch_size], prompt_embeds)
        return images

    def _embed_prompt(self) -> Mapping[str, torch.Tensor]:
        if self._prompt_embeds is not None:
            return self._prompt_embeds
        texts = [self._settings.prompt, ""]
        return encode_captions(self._base.text_encoder, self._base.tokenizer, texts)

    def _generate_batch(
        self, seeds: Sequence[int], prompt_embeds: Mapping[str, torch.Tensor]
    ) -> list[Image.Image]:
        positive = prompt_embeds[self._settings.prompt].expand(len(seeds), -1, -1)
        negative = prompt_embeds[""].expand(len(seeds), -1, -1)
        side = self._settings.resolution
        sampling = SamplingSettings(side, side, NUM_INFERENCE_STEPS, GUIDANCE_SCALE)
        with self._autocast():
            return denoise.generate_images(
                self._base, PromptEmbeds(positive, negative), seeds, sampling, self._on_step
            )

    def _reduce_memory(self) -> None:
        if self._batch_size == 1:
            raise UserError("one at a time they need more memory than there is")
        self._batch_size = 1

    def _release_vae(self) -> None:
        if self._settings.keeps_vae:
            self._base.vae.disable_tiling()
        else:
            self._base.release("vae")


def make_validation(
    base: Base, captions: CaptionEmbeddings, config: TrainConfig, run: Run
) -> Callable[[int], None]:
    """A function that generates the sample images of a step, in the main process, and shows them in
    TensorBoard."""
    finer = " or ".join(runtime.finer_precisions(run.compute))
    settings = ValidationSettings(
        config.validation.validation_prompt,
        [run.state.seed + i for i in range(config.validation.num_validation_images)],
        config.data.resolution,
        run.compute.vae_tile,
        keeps_vae=config.cache.no_cache,
        black_remedy=f"; if more are, try --mixed_precision {finer}" if finer else "",
    )
    validation = Validation(
        base, captions.prompt_embeds, settings, run.autocast, run.stop_signal.raise_if_received
    )

    def validate(step: int) -> None:
        if run.is_main_process:
            images = validation.generate(step, run.output.samples_folder(step))
            names = [settings.prompt] * len(images)
            run.log.add_images("validation", map(np.asarray, images), step, names)
            folder = run.output.samples_folder(step)
            if samples := validation.records(folder):
                message = f"step {step}: samples in {folder}"
                log_event(log, "samples", message, step=step, path=str(folder))
            run.history.add_samples(step, samples)
            run.save_history(step)

    return validate

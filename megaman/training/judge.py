"""The loss of the models in training on held-out images, whatever the run trains and holds in
memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch

from megaman import runtime
from megaman.errors import UserError
from megaman.models.text_encoding import encode_captions
from megaman.training.held_out import BATCH_SIZE, ImageSet, held_out_losses

if TYPE_CHECKING:
    from torch import nn

    from megaman.config.settings import TrainConfig
    from megaman.models.base import Base
    from megaman.models.text_encoding import CaptionEmbeddings
    from megaman.training.run import Run

SEED = 0  # of the noise, in every run and process


class Judge:
    """Computes the loss of the models in training on images at fixed noise.

    Args:
        prompt_embeds: [positions, width] by caption; None if the text encoder is in training and
            has to encode them each time.
        sets: the held-out images, and the images to learn that they are compared with.
        resolution: side of the images in pixels, on which the batch size depends.
    """

    def __init__(
        self,
        base: Base,
        prompt_embeds: Mapping[str, torch.Tensor] | None,
        sets: Sequence[ImageSet],
        resolution: int,
        autocast: Callable[[], AbstractContextManager],
    ):
        self._base, self._prompt_embeds, self._autocast = base, prompt_embeds, autocast
        self.held_out, probes = sets
        self.probes = _repeat(probes, len(self.held_out.latents))
        self._batch_size = min(BATCH_SIZE, 4 * runtime.default_batch_size(resolution, resolution))

    def losses(self, images: ImageSet) -> list[float]:
        """The mean loss of the images in each part of the schedule, low timesteps first.

        Raises UserError if memory does not suffice for a single image.
        """
        models: list[nn.Module] = [self._base.unet]
        if self._prompt_embeds is None:
            models.append(self._base.text_encoder)
        try:
            for model in models:
                model.eval()
            compute = partial(self._losses, images)
            return runtime.retry_on_oom(compute, self._reduce_memory)
        finally:
            for model in models:
                model.train()

    def _losses(self, images: ImageSet) -> list[float]:
        with self._autocast():
            prompt_embeds = self._embed(images.captions)
            by_size: dict[torch.Size, list[int]] = {}
            for index, latents in enumerate(images.latents):
                by_size.setdefault(latents.shape, []).append(index)
            losses = [
                held_out_losses(
                    self._base.unet,
                    self._base.noise_scheduler,
                    torch.stack([images.latents[index] for index in indices]),
                    torch.stack([prompt_embeds[images.captions[index]] for index in indices]),
                    SEED,
                    self._batch_size,
                )
                for indices in by_size.values()
            ]
        return torch.cat(losses, dim=1).mean(1).tolist()

    def _embed(self, captions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        if self._prompt_embeds is not None:
            return self._prompt_embeds
        return encode_captions(self._base.text_encoder, self._base.tokenizer, captions)

    def _reduce_memory(self) -> None:
        if self._batch_size == 1:
            raise UserError("one image needs more memory than there is")
        self._batch_size = 1


def _repeat(images: ImageSet, count: int) -> ImageSet:
    """So many images, repeated if there are fewer, so that each has the noise of its counterpart;
    none of none."""
    indices = [i % len(images.latents) for i in range(count if images.latents else 0)]
    return ImageSet([images.latents[i] for i in indices], [images.captions[i] for i in indices])


def make_judge(
    base: Base,
    captions: CaptionEmbeddings,
    evaluated: Sequence[ImageSet],
    config: TrainConfig,
    run: Run,
) -> Judge | None:
    """The judge of a run, None if nothing is held out.

    evaluated has the held-out images and the images to learn that they are compared with.
    """
    if not evaluated:
        return None
    resolution = config.data.resolution
    return Judge(base, captions.prompt_embeds, evaluated, resolution, run.autocast)

"""The loss of the models in training on held-out images, whatever the run trains and holds in
memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch

from megaman import runtime
from megaman.errors import UserError, summarize_error
from megaman.models.text_encoding import encode_captions
from megaman.processes import Processes
from megaman.training.held_out import BATCH_SIZE, NUM_TIMESTEPS, ImageSet, Questions

if TYPE_CHECKING:
    from torch import nn

    from megaman.config.settings import TrainConfig
    from megaman.models.base import Base
    from megaman.models.text_encoding import CaptionEmbeddings
    from megaman.training.run import Run

SEED = 0  # of the noise, in every run and process


class Judge:
    """Computes the loss of the models in training on images at fixed noise, which the processes
    share out.

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
        processes: Processes | None = None,
    ):
        self._processes = processes or Processes()
        self._base, self._prompt_embeds, self._autocast = base, prompt_embeds, autocast
        self.held_out, probes = sets
        self.probes = _repeat(probes, len(self.held_out.latents))
        # How the questions are shared out, and how many of a batch the UNet sees at a time.
        self._batch_size = min(BATCH_SIZE, 4 * runtime.default_batch_size(resolution, resolution))
        self._at_once = self._batch_size

    def losses(self, images: ImageSet) -> list[float]:
        """The mean loss of the images in each part of the schedule, low timesteps first; all
        processes have to ask for it.

        Raises UserError in all of them if memory does not suffice for a single image in one.
        """
        models: list[nn.Module] = [self._base.unet]
        if self._prompt_embeds is None:
            models.append(self._base.text_encoder)
        try:
            for model in models:
                model.eval()
            compute = partial(self._own_losses, images)
            own = runtime.retry_on_oom(compute, self._reduce_memory)
        except Exception as error:
            if self._processes.count == 1:
                raise
            own = summarize_error(error)
        finally:
            for model in models:
                model.train()
        return self._join(self._processes.exchange(own), images)

    def _own_losses(self, images: ImageSet) -> list[torch.Tensor]:
        """The losses of each batch of questions that this process computes."""
        own = []
        with self._autocast():
            for questions, batch in self._processes.share(self._batches(images)):
                at_once = self._at_once
                parts = [batch[start : start + at_once] for start in range(0, len(batch), at_once)]
                losses = [questions.losses(self._base.unet, part) for part in parts]
                own.append(torch.cat(losses))
        return own

    def _batches(self, images: ImageSet) -> list[tuple[Questions, range]]:
        """All questions of all sizes of images, in batches."""
        prompt_embeds = self._embed(images.captions)
        batches = []
        for indices in _by_size(images):
            questions = Questions.ask(
                self._base.noise_scheduler,
                torch.stack([images.latents[index] for index in indices]),
                torch.stack([prompt_embeds[images.captions[index]] for index in indices]),
                SEED,
            )
            batches += [(questions, batch) for batch in questions.batches(self._batch_size)]
        return batches

    def _join(self, shares: list[list[torch.Tensor] | str], images: ImageSet) -> list[float]:
        """The mean loss in each part of the schedule, of the batches that each process computed."""
        computed: list[list[torch.Tensor]] = []
        for share in shares:
            if isinstance(share, str):
                raise UserError(share)
            computed.append(share)
        total, count = sum(map(len, computed)), len(computed)
        batches = [computed[number % count][number // count] for number in range(total)]
        sizes = [NUM_TIMESTEPS * len(indices) for indices in _by_size(images)]
        by_size = torch.cat(batches).split(sizes)
        return torch.cat([losses.view(NUM_TIMESTEPS, -1) for losses in by_size], 1).mean(1).tolist()

    def _embed(self, captions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        if self._prompt_embeds is not None:
            return self._prompt_embeds
        return encode_captions(self._base.text_encoder, self._base.tokenizer, captions)

    def _reduce_memory(self) -> None:
        if self._at_once == 1:
            raise UserError("one image needs more memory than there is")
        self._at_once = 1


def _by_size(images: ImageSet) -> list[list[int]]:
    """The indices of the images of each size."""
    by_size: dict[torch.Size, list[int]] = {}
    for index, latents in enumerate(images.latents):
        by_size.setdefault(latents.shape, []).append(index)
    return list(by_size.values())


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
    return Judge(base, captions.prompt_embeds, evaluated, resolution, run.autocast, run.processes)

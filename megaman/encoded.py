"""Encoded pictures as the loop takes them: in their batches, with what is random about each drawn by its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaman import diffusion
from megaman.batches import Batches, Part
from megaman.schedule import caption_random_for, random_for

if TYPE_CHECKING:
    from megaman.cache import Kept
    from megaman.captions import Variation
    from megaman.dataset import MegaManDataset
    from megaman.fresh import Fresh


class Encoded:
    """A dataset with the VAE's moments of its pictures, in the order of the run.

    A run has one of the pictures to learn and, where there are class pictures, one of those. Its seed is another, which
    gives it an order and random numbers of its own, and a step sees as many of its pictures as of the first: the loss
    is mean(first) + weight * mean(second), DreamBooth's prior preservation (Ruiz et al. 2022, arXiv 2208.12242) as in
    diffusers' example.

    Args:
        source: of the pictures' moments, in the dataset's order: cache.Kept, or fresh.Fresh, which makes them anew.
        vae_factor: pixels a side of one latent cell.
        in_buckets: whether the pictures may differ in size, so that batches have to be of one.
        at_once, accumulated, processes: pictures of a batch and process, batches of a step, processes.
        variation: how the captions differ from one visit to the next.
    """

    def __init__(
        self,
        dataset: MegaManDataset,
        source: Kept | Fresh,
        vae_factor: int,
        in_buckets: bool,
        at_once: int,
        accumulated: int,
        processes: int,
        variation: Variation,
        seed: int,
        weight: float = 1.0,
    ):
        self.dataset, self.source, self.variation = dataset, source, variation
        self.seed, self.weight = seed, weight
        self._epoch = dataset.epoch()
        # Width and height of each picture that an epoch sees.
        self.sizes = [tuple(vae_factor * side for side in reversed(source.cells(i))) for i in self._epoch]
        buckets = self.sizes if in_buckets else None
        self.batches = Batches(len(self._epoch), buckets, at_once, accumulated, processes, seed)

    def look_ahead(self, step: int, process: int, size: int) -> None:
        """Have the source prepare what this process will draw in this step and the next one."""
        parts = [part for each in (step, step + 1) for part in self.batches.parts(each, process, size)]
        self.source.look_ahead(
            [visit for part in parts for visit in zip(part.numbers, self._indices(part), strict=True)]
        )

    def draw(
        self, part: Part, scaling_factor: float, noise_offset: float, num_train_timesteps: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Latents and noise [B, 4, h, w], timesteps [B] and captions of a part's pictures; the latents where their
        moments are, the rest on the CPU.

        Each is one of its picture's variants, and what is random hangs on the seed and the number alone.
        """
        indices, generators = self._indices(part), [random_for(self.seed, number) for number in part.numbers]
        picks = [int(torch.randint(self.source.count(index), (1,), generator=generator))
                 for index, generator in zip(indices, generators, strict=True)]  # fmt: skip
        moments = self.source.of(part.numbers, indices, picks)
        latents, noise, timesteps = [], [], []
        for row, generator in zip(moments.split(1), generators, strict=True):
            latents.append(diffusion.draw_latents(row, scaling_factor, generator))
            noise.append(diffusion.draw_noise(latents[-1].shape, noise_offset, generator))
            timesteps.append(diffusion.draw_timesteps(1, num_train_timesteps, generator))
        captions = [self.variation.of(self.dataset.captions[index], caption_random_for(self.seed, number))
                    for index, number in zip(indices, part.numbers, strict=True)]  # fmt: skip
        return torch.cat(latents), torch.cat(noise), torch.cat(timesteps), captions

    def _indices(self, part: Part) -> list[int]:
        return [self._epoch[place] for place in part.pictures]

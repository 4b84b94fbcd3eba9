"""Encoded pictures as the loop takes them: in their batches, with what is random about each drawn by its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaman import diffusion
from megaman.batches import Batches, Part
from megaman.schedule import caption_random_for, random_for

if TYPE_CHECKING:
    from megaman.captions import Variation
    from megaman.dataset import MegaManDataset


class Encoded:
    """A dataset with the VAE's moments of its pictures, in the order of the run.

    A run has one of the pictures to learn and, where there are class pictures, one of those. Its seed is another, which
    gives it an order and random numbers of its own, and a step sees as many of its pictures as of the first: the loss
    is mean(first) + weight * mean(second), DreamBooth's prior preservation (Ruiz et al. 2022, arXiv 2208.12242) as in
    diffusers' example.

    Args:
        moments: one tensor [variants, 8, h, w] a picture.
        vae_factor: pixels a side of one latent cell.
        in_buckets: whether the pictures may differ in size, so that batches have to be of one.
        at_once, accumulated, processes: pictures of a batch and process, batches of a step, processes.
        variation: how the captions differ from one visit to the next.
    """

    def __init__(
        self,
        dataset: MegaManDataset,
        moments: list[torch.Tensor],
        vae_factor: int,
        in_buckets: bool,
        at_once: int,
        accumulated: int,
        processes: int,
        variation: Variation,
        seed: int,
        weight: float = 1.0,
    ):
        self.dataset, self.moments, self.variation = dataset, moments, variation
        self.seed, self.weight = seed, weight
        self._epoch = dataset.epoch()
        # Width and height of each picture that an epoch sees.
        self.sizes = [tuple(vae_factor * side for side in reversed(moments[i].shape[2:])) for i in self._epoch]
        buckets = self.sizes if in_buckets else None
        self.batches = Batches(len(self._epoch), buckets, at_once, accumulated, processes, seed)

    def draw(
        self, part: Part, scaling_factor: float, noise_offset: float, num_train_timesteps: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Latents and noise [B, 4, h, w], timesteps [B] and captions of a part's pictures, on the CPU.

        Each is one of its picture's variants, and what is random hangs on the seed and the number alone.
        """
        indices = [self._epoch[place] for place in part.pictures]
        drawn = []
        for index, number in zip(indices, part.numbers, strict=True):
            generator = random_for(self.seed, number)
            pick = int(torch.randint(len(self.moments[index]), (1,), generator=generator))
            latents = diffusion.draw_latents(self.moments[index][pick][None], scaling_factor, generator)
            noise = diffusion.draw_noise(latents.shape, noise_offset, generator)
            drawn.append((latents, noise, diffusion.draw_timesteps(1, num_train_timesteps, generator)))
        latents, noise, timesteps = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        captions = [self.variation.of(self.dataset.captions[index], caption_random_for(self.seed, number))
                    for index, number in zip(indices, part.numbers, strict=True)]  # fmt: skip
        return latents, noise, timesteps, captions

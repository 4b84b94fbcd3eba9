"""Encoded pictures as the loop takes them: in their batches, with what is random about each drawn by its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaman import diffusion
from megaman.batches import Batches, Part
from megaman.schedule import random_for

if TYPE_CHECKING:
    from megaman.dataset import MegaManDataset


class Encoded:
    """A dataset with the VAE's moments of its pictures, in the order of the run.

    A run has one of the pictures to learn and, where there are class pictures, one of those: the second has an order
    and random numbers of its own, since its seed is another, and its losses count weight times. As many of them are
    seen in a step as of the first, so that a step's loss is mean(first) + weight * mean(second): DreamBooth's prior
    preservation (Ruiz et al. 2022, arXiv 2208.12242), with the names of diffusers' example.

    Args:
        moments: one tensor [variants, 8, h, w] a picture.
        vae_factor: pixels a side of one latent cell.
        in_buckets: whether the pictures may differ in size, so that batches have to be of one.
        at_once, accumulated, processes: pictures of a batch and process, batches of a step, processes.
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
        seed: int,
        weight: float = 1.0,
    ):
        self.dataset, self.moments, self.seed, self.weight = dataset, moments, seed, weight
        self.sizes = [
            tuple(vae_factor * side for side in reversed(each.shape[2:])) for each in moments
        ]  # width, height
        self._epoch = dataset.epoch()
        buckets = [self.sizes[i] for i in self._epoch] if in_buckets else None
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
        return latents, noise, timesteps, [self.dataset.captions[i] for i in indices]

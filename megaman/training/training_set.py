"""What a run trains on: a dataset with its latents, its order and its random numbers.

Everything random is generated on the CPU by each sample's index; the rest is the device's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from megaman.data.batches import Batches, caption_rng_for, class_seed, generator_for
from megaman.data.captions import CaptionAugmentation
from megaman.training import loss as diffusion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megaman.config.settings import TrainConfig
    from megaman.data.batches import MicroBatch
    from megaman.data.dataset import MegaManDataset
    from megaman.data.latents import LatentSource
    from megaman.training.datasets import Datasets
    from megaman.training.run import Run


class Samples(NamedTuple):
    """The inputs of a micro-batch of B images: latents and noise [B, 4, h, w], timesteps [B]; with
    --alpha_mask the images' opacity [B, 1, h, w]."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    captions: list[str]
    mask: torch.Tensor | None


class TrainingSet:
    """A dataset with the latents of its images, in the order of the run.

    A run has one for the images to learn and, if there are class images, one for those. Its seed is
    another, which gives it an order and random numbers of its own, and a step sees as many of its
    images as of the first: the loss is mean(first) + weight * mean(second), DreamBooth's prior
    preservation (Ruiz et al. 2022, arXiv 2208.12242) as in diffusers' example.
    """

    def __init__(
        self,
        dataset: MegaManDataset,
        latents: LatentSource,
        batches: Batches,
        augmentation: CaptionAugmentation,
        seed: int,
        weight: float = 1.0,
    ):
        self.dataset, self.latents, self.batches = dataset, latents, batches
        self.seed, self.weight = seed, weight
        self._augmentation = augmentation
        self._indices = dataset.epoch_indices()

    def prefetch(self, step: int, rank: int, size: int) -> None:
        """Have the latents prepared that this process will need in this step and the next one."""
        samples: list[tuple[int, int]] = []
        for batch in [
            *self.batches.micro_batches(step, rank, size),
            *self.batches.micro_batches(step + 1, rank, size),
        ]:
            samples += zip(batch.sample_indices, self._images(batch), strict=True)
        self.latents.prefetch(samples)

    def load(
        self,
        batch: MicroBatch,
        scaling_factor: float,
        noise_offset: float,
        num_train_timesteps: int,
    ) -> Samples:
        """The samples of a micro-batch: the latents on the device of the source, the rest on the
        CPU.

        Each is one of its image's crops; everything random depends on seed and sample index only.
        """
        images = self._images(batch)
        generators = [generator_for(self.seed, index) for index in batch.sample_indices]
        crops = [
            int(torch.randint(self.latents.num_crops(image), (1,), generator=generator))
            for image, generator in zip(images, generators, strict=True)
        ]
        posteriors = self.latents.get_batch(batch.sample_indices, images, crops)
        posteriors, mask = diffusion.split_mask(posteriors)
        latents, noise, timesteps = [], [], []
        for posterior, generator in zip(posteriors.split(1), generators, strict=True):
            latents.append(diffusion.sample_posterior(posterior, scaling_factor, generator))
            noise.append(diffusion.sample_noise(latents[-1].shape, noise_offset, generator))
            timesteps.append(diffusion.sample_timesteps(1, num_train_timesteps, generator))
        captions = [
            self._augmentation.apply(
                self.dataset.examples[image].caption, caption_rng_for(self.seed, index)
            )
            for image, index in zip(images, batch.sample_indices, strict=True)
        ]
        return Samples(torch.cat(latents), torch.cat(noise), torch.cat(timesteps), captions, mask)

    def image_sizes(self, vae_scale_factor: int) -> list[tuple[int, int]]:
        """Width and height in pixels of each image that an epoch sees."""
        sizes = [self.latents.latent_size(index) for index in self._indices]
        return [(width * vae_scale_factor, height * vae_scale_factor) for height, width in sizes]

    def _images(self, batch: MicroBatch) -> list[int]:
        """The indices of a micro-batch's images in the dataset."""
        return [self._indices[position] for position in batch.positions]


def make_training_sets(
    config: TrainConfig, datasets: Datasets, latents: Sequence[LatentSource], run: Run
) -> list[TrainingSet]:
    """The training sets of the images and, if there are any, of the class images, whose captions
    are not augmented."""
    seed = run.state.seed

    def make_batches(dataset: MegaManDataset, source: LatentSource, seed: int) -> Batches:
        return _make_batches(dataset, source, run, seed)

    augmentation = CaptionAugmentation(
        shuffle_caption=config.captions.shuffle_caption,
        keep_tokens=config.captions.keep_tokens,
        caption_tag_dropout_rate=config.captions.caption_tag_dropout_rate,
        caption_dropout_rate=config.captions.caption_dropout_rate,
    )
    images = datasets.images
    batches = make_batches(images, latents[0], seed)
    sets = [TrainingSet(images, latents[0], batches, augmentation, seed)]
    if datasets.class_images is not None:
        seed, weight = class_seed(seed), config.loss.prior_loss_weight
        batches = make_batches(datasets.class_images, latents[1], seed)
        augmentation = CaptionAugmentation()
        sets.append(
            TrainingSet(datasets.class_images, latents[1], batches, augmentation, seed, weight)
        )
    return sets


def _make_batches(
    dataset: MegaManDataset,
    latents: LatentSource,
    run: Run,
    seed: int,
) -> Batches:
    indices = dataset.epoch_indices()
    buckets = [latents.latent_size(index) for index in indices] if dataset.buckets else None
    return Batches(
        len(indices),
        buckets,
        run.step_images.batch_size,
        run.step_images.accumulation_steps,
        run.world_size,
        seed,
    )

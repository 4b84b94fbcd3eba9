"""One optimizer step: its pictures with what is random about each, its gradients, and what if they
are not finite.

What is random is drawn on the CPU by each picture's number; the rest is the device's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from megaman.data import batches
from megaman.data.batches import Batches, MicroBatch, caption_rng_for, generator_for
from megaman.errors import UserError
from megaman.training import loss as diffusion

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from megaman.data.captions import CaptionAugmentation
    from megaman.data.dataset import MegaManDataset
    from megaman.data.latents import LatentSource
    from megaman.training.compute import Split

PATIENCE = 10  # bad steps in a row; a loss scale that is still finding its size takes fewer


class Encoded:
    """A dataset with the VAE's moments of its pictures, in the order of the run.

    A run has one of the pictures to learn and, where there are class pictures, one of those. Its
    seed is another, which gives it an order and random numbers of its own, and a step sees as many
    of its pictures as of the first: the loss is mean(first) + weight * mean(second), DreamBooth's
    prior preservation (Ruiz et al. 2022, arXiv 2208.12242) as in diffusers' example.

    Args:
        source: of the images' latents, by their index in the dataset.
        vae_scale_factor: pixels a side of one latent cell.
        in_buckets: whether the pictures may differ in size, so that batches have to be of one.
        at_once, accumulated, processes: pictures of a batch and process, batches of a step,
            processes.
        augmentation: how the captions differ from one visit to the next.
    """

    def __init__(
        self,
        dataset: MegaManDataset,
        source: LatentSource,
        vae_scale_factor: int,
        in_buckets: bool,
        at_once: int,
        accumulated: int,
        processes: int,
        augmentation: CaptionAugmentation,
        seed: int,
        weight: float = 1.0,
    ):
        self.dataset, self.source, self.augmentation = dataset, source, augmentation
        self.seed, self.weight = seed, weight
        self._epoch = dataset.epoch_indices()
        # Width and height of each picture that an epoch sees.
        self.sizes = [
            tuple(vae_scale_factor * side for side in reversed(source.latent_size(i)))
            for i in self._epoch
        ]
        buckets = self.sizes if in_buckets else None
        self.batches = Batches(len(self._epoch), buckets, at_once, accumulated, processes, seed)

    def look_ahead(self, step: int, process: int, size: int) -> None:
        """Have the source prepare what this process will draw in this step and the next one."""
        parts = [
            part
            for each in (step, step + 1)
            for part in self.batches.micro_batches(each, process, size)
        ]
        self.source.prefetch(
            [
                visit
                for part in parts
                for visit in zip(part.sample_indices, self._indices(part), strict=True)
            ]
        )

    def draw(
        self, part: MicroBatch, scaling_factor: float, noise_offset: float, num_train_timesteps: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Latents and noise [B, 4, h, w], timesteps [B] and captions of a part's pictures; the
        latents where their moments are, the rest on the CPU.

        Each is one of its picture's variants, and what is random hangs on the seed and the number
        alone.
        """
        indices, generators = (
            self._indices(part),
            [generator_for(self.seed, number) for number in part.sample_indices],
        )
        picks = [
            int(torch.randint(self.source.num_crops(index), (1,), generator=generator))
            for index, generator in zip(indices, generators, strict=True)
        ]
        moments = self.source.get_batch(part.sample_indices, indices, picks)
        latents, noise, timesteps = [], [], []
        for row, generator in zip(moments.split(1), generators, strict=True):
            latents.append(diffusion.draw_latents(row, scaling_factor, generator))
            noise.append(diffusion.draw_noise(latents[-1].shape, noise_offset, generator))
            timesteps.append(diffusion.draw_timesteps(1, num_train_timesteps, generator))
        captions = [
            self.augmentation.apply(
                self.dataset.examples[index].caption, caption_rng_for(self.seed, number)
            )
            for index, number in zip(indices, part.sample_indices, strict=True)
        ]
        return torch.cat(latents), torch.cat(noise), torch.cat(timesteps), captions

    def _indices(self, part: MicroBatch) -> list[int]:
        return [self._epoch[place] for place in part.positions]


class TrainingStep:
    """Computes steps of the pictures in encoded, which are the run's own and, where there are any,
    class pictures.

    Args:
        models: those in training as accelerate prepared them, the UNet first.
        dtype: what the UNet computes in; the loss is float32.
        read: captions to text states [B, positions, width], on any device.
        backward, no_sync, process: accelerate's: how to go backward from a loss, how to put off the
            exchange of gradients between processes, and which of them this is.
        scaling_factor: of the VAE's latents.
        noise_offset, snr_gamma: see loss.draw_noise and loss.min_snr_weights.
        dropout: whether the LoRA drops inputs, for which torch's random state is set.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        scheduler: DDPMScheduler,
        encoded: Sequence[Encoded],
        read: Callable[[list[str]], torch.Tensor],
        backward: Callable[[torch.Tensor], None],
        no_sync: Callable[[torch.nn.Module], AbstractContextManager],
        process: int,
        device: torch.device,
        dtype: torch.dtype,
        scaling_factor: float,
        noise_offset: float = 0.0,
        snr_gamma: float | None = None,
        dropout: bool = False,
    ):
        self.models, self.scheduler, self.encoded, self.read = models, scheduler, encoded, read
        self.backward, self.no_sync, self.process = backward, no_sync, process
        self.device, self.dtype, self.scaling_factor = device, dtype, scaling_factor
        self.noise_offset, self.snr_gamma, self.dropout = noise_offset, snr_gamma, dropout

    def accumulate(self, step: int, split: Split) -> torch.Tensor:
        """Add up the gradients of step 1, 2, ... split as it is now; returns its loss (0-d)."""
        step_loss = torch.zeros((), device=self.device)
        parts = [
            (these, part)
            for these in self.encoded
            for part in these.batches.micro_batches(step, self.process, split.size)
        ]
        for these in self.encoded:
            these.look_ahead(step, self.process, split.size)
        for these, part in parts:
            with (
                contextlib.ExitStack() as alone
            ):  # the processes exchange gradients in the last one only
                for model in self.models if part is not parts[-1][1] else []:
                    alone.enter_context(self.no_sync(model))
                loss = these.weight * self.loss(these, part) / part.divisor
                self.backward(loss)
                step_loss += loss.detach()
        return step_loss

    def loss(self, these: Encoded, part: MicroBatch) -> torch.Tensor:
        """The mean loss of a part's pictures (0-d)."""
        latents, noise, timesteps, captions = these.draw(
            part, self.scaling_factor, self.noise_offset, self.scheduler.config.num_train_timesteps
        )
        weights = diffusion.loss_weights(self.scheduler, timesteps, self.snr_gamma)
        if latents.device.type != "cpu":  # they were encoded just now
            noise, timesteps = self._there(noise), self._there(timesteps)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        wanted = diffusion.target(self.scheduler, latents, noise, timesteps)
        if self.dropout:
            batches.seed_dropout(these.seed, part.sample_indices[0])
        states = self._there(self.read(captions), self.dtype)
        noise_pred = self.models[0](
            self._there(noisy, self.dtype), self._there(timesteps), states
        ).sample
        return diffusion.loss(
            noise_pred, self._there(wanted), None if weights is None else self._there(weights)
        )

    def _there(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on the device. From pinned memory, or else the CPU would wait until a card has
        done all before."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.to(dtype or tensor.dtype).pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device, dtype)


def step_where_finite(
    optimizer: torch.optim.Optimizer,
    gradient_norm: torch.Tensor,
    scaler: torch.amp.GradScaler | None,
) -> torch.Tensor:
    """Step the (accelerate-prepared) optimizer unless the gradients' norm is not finite; returns
    whether it is (0-d).

    A loss scaler decides for itself. Without one, torch's fused AdamW reads the same flag that a
    scaler sets, on the device, so that nothing has to wait for the answer.
    """
    finite = torch.isfinite(gradient_norm)
    inner = optimizer.optimizer
    if scaler is None and inner.defaults["fused"]:
        inner.found_inf = (~finite).float()
        optimizer.step()
    elif scaler is not None or finite:
        optimizer.step()
    return finite


class SkippedSteps:
    """Counts the steps that were skipped, over the run and in a row."""

    def __init__(self) -> None:
        self.total = self.in_a_row = 0

    def note(self, finite: Sequence[bool], last_step: int) -> list[int]:
        """Take in whether each of the steps up to last_step was finite; returns the numbers of
        those that were not.

        Raises UserError after PATIENCE of them in a row.
        """
        skipped = []
        for number, good in enumerate(finite, start=last_step - len(finite) + 1):
            self.in_a_row = 0 if good else self.in_a_row + 1
            if not good:
                self.total += 1
                skipped.append(number)
            if self.in_a_row == PATIENCE:
                raise UserError(
                    f"The gradients were not finite in {PATIENCE} steps in a row, up to step {number}",
                    "Likely causes: --learning_rate too high, --lora_alpha too high for --lora_rank, or fp16 (try "
                    "--mixed_precision bf16 or no). The last checkpoint is good",
                )
        return skipped

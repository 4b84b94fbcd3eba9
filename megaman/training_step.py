"""The gradients of one optimizer step: what is random is drawn on the CPU, a picture each; the rest is the device's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from megaman import diffusion, schedule

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from megaman.batches import Part
    from megaman.encoded import Encoded
    from megaman.memory import Split


class TrainingStep:
    """Computes steps of the pictures in encoded, which are the run's own and, where there are any, class pictures.

    Args:
        models: those in training as accelerate prepared them, the UNet first.
        dtype: what the UNet computes in; the loss is float32.
        read: captions to text states [B, positions, width], on any device.
        backward, no_sync, process: accelerate's: how to go backward from a loss, how to put off the exchange of
            gradients between processes, and which of them this is.
        scaling_factor: of the VAE's latents.
        noise_offset, snr_gamma: see diffusion.draw_noise and diffusion.min_snr_weights.
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
        parts = [(these, part) for these in self.encoded
                 for part in these.batches.parts(step, self.process, split.size)]  # fmt: skip
        for these in self.encoded:
            these.look_ahead(step, self.process, split.size)
        for these, part in parts:
            with contextlib.ExitStack() as alone:  # the processes exchange gradients in the last one only
                for model in self.models if part is not parts[-1][1] else []:
                    alone.enter_context(self.no_sync(model))
                loss = these.weight * self.loss(these, part) / part.divisor
                self.backward(loss)
                step_loss += loss.detach()
        return step_loss

    def loss(self, these: Encoded, part: Part) -> torch.Tensor:
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
            schedule.seed_dropout(these.seed, part.numbers[0])
        states = self._there(self.read(captions), self.dtype)
        noise_pred = self.models[0](self._there(noisy, self.dtype), self._there(timesteps), states).sample
        return diffusion.loss(noise_pred, self._there(wanted), None if weights is None else self._there(weights))

    def _there(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on the device. From pinned memory, or else the CPU would wait until a card has done all before."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.to(dtype or tensor.dtype).pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device, dtype)

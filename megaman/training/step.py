"""One optimizer step: the gradients of its micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from megaman import cuda
from megaman.data import batches
from megaman.models.typed import add_noise, predict_noise, scheduler_config
from megaman.runtime import retry_on_oom
from megaman.training import loss as diffusion

if TYPE_CHECKING:
    from megaman.config.learning_settings import LossConfig
    from megaman.data.batches import MicroBatch
    from megaman.models.base import Base
    from megaman.models.text_encoding import CaptionEmbeddings
    from megaman.training.adapters import Adapters
    from megaman.training.run import Run
    from megaman.training.training_set import TrainingSet

log = logging.getLogger(__name__)


class TrainingStep:
    """Computes the gradients of optimizer steps over the images of all training sets."""

    def __init__(
        self,
        base: Base,
        adapters: Adapters,
        training_sets: Sequence[TrainingSet],
        captions: CaptionEmbeddings,
        config: LossConfig,
        run: Run,
    ):
        self._noise_scheduler, self._scaling_factor = base.noise_scheduler, base.scaling_factor
        self._adapters, self._sets, self._captions = adapters, training_sets, captions
        self._config, self._run = config, run
        self._models = [run.prepare_model(model) for model in adapters.models]
        for model in adapters.models:
            model.train()

    def accumulate(self, step: int) -> torch.Tensor:
        """Add up the gradients of step 1, 2, ..., those of all processes; returns this process's
        share of its loss (0-d).

        If memory runs out, the process computes its share again with less (see memory_saving.py).
        """
        loss = retry_on_oom(partial(self._accumulate, step), self._reduce_memory)
        self._run.exchange_gradients(self._adapters.parameters)
        return loss

    def _accumulate(self, step: int) -> torch.Tensor:
        rank, size = self._run.rank, self._run.compute.micro_batching.size
        micro_batches: list[tuple[TrainingSet, MicroBatch]] = []
        for training_set in self._sets:
            batches_of_set = training_set.batches.micro_batches(step, rank, size)
            micro_batches += [(training_set, batch) for batch in batches_of_set]
            training_set.prefetch(step, rank, size)
        step_loss = torch.zeros((), device=self._run.device)
        for training_set, batch in micro_batches:
            loss = training_set.weight * self._loss(training_set, batch) / batch.divisor
            self._run.backward(loss)
            step_loss += loss.detach()
        if not micro_batches:  # fp16's loss scaler begins with a backward pass
            self._run.backward(torch.zeros_like(step_loss).requires_grad_())
        return step_loss

    def _loss(self, training_set: TrainingSet, batch: MicroBatch) -> torch.Tensor:
        """The mean loss of a micro-batch (0-d)."""
        scheduler, config, dtype = self._noise_scheduler, self._config, self._run.compute.dtype
        latents, noise, timesteps, captions, mask = training_set.load(
            batch,
            self._scaling_factor,
            config.noise_offset,
            scheduler_config(scheduler).num_train_timesteps,
        )
        if latents.device.type != "cpu":  # they were encoded just now
            noise, timesteps = self._to_device(noise), self._to_device(timesteps)
        noisy = add_noise(scheduler, latents, noise, timesteps)  # moves the scheduler's tensors
        weights = diffusion.loss_weights(scheduler, timesteps, config.snr_gamma)
        target = diffusion.target(scheduler, latents, noise, timesteps)
        if self._adapters.has_dropout:
            batches.seed_dropout(training_set.seed, batch.sample_indices[0])
        prompt_embeds = self._to_device(self._embed(captions), dtype)
        noise_pred = predict_noise(
            self._models[0],
            self._to_device(noisy, dtype),
            self._to_device(timesteps),
            prompt_embeds,
        )
        if weights is not None:
            weights = self._to_device(weights)
        if mask is not None:
            mask = self._to_device(mask)
        return diffusion.loss(noise_pred, self._to_device(target), weights, mask)

    def _embed(self, captions: list[str]) -> torch.Tensor:
        """prompt_embeds [B, positions, width], from the text encoder in training if there is
        one."""
        text_encoder = None if self._adapters.text_encoder is None else self._models[1]
        return self._captions(captions, text_encoder)

    def _to_device(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return cuda.upload(tensor, self._run.device, dtype)

    def _reduce_memory(self) -> None:
        self._adapters.zero_grad()
        resolution = self._sets[0].dataset.size
        measure = self._run.reduce_memory(self._adapters.models, resolution)
        log.info("too little memory: %s", measure)

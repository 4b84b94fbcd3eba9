"""How many steps a run has, the learning rate at each, and an optimizer that skips steps whose
gradients are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from megaman.errors import UserError
from megaman.training.optimizers import create_optimizer

if TYPE_CHECKING:
    from megaman.config.learning_settings import OptimizerConfig
    from megaman.training.adapters import Adapters
    from megaman.training.run import Run
    from megaman.training.training_set import TrainingSet

LearningRate = Callable[[int], float]  # as a function of the steps done
# With --max_train_steps auto: visits of images in all.
VISITS_PER_IMAGE, MIN_VISITS, MAX_VISITS = 150, 1500, 50_000
PATIENCE = 10  # skipped steps in a row; a loss scale that is still being adapted takes fewer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """The length of a run in optimizer steps and in epochs, its warm-up in steps, and the images of
    a step."""

    total_steps: int
    warmup_steps: int
    epochs: float
    images_per_step: int = 1

    def steps_of(self, epochs: int) -> int:
        """The steps that so many epochs take, the last of which may reach into the next one."""
        return math.ceil(round(epochs * self.total_steps / self.epochs, 6))


def make_schedule(
    training_set: TrainingSet, config: OptimizerConfig, explicit: Collection[str], run: Run
) -> Schedule:
    """The schedule of a run on its images to learn; raises UserError if the checkpoint is beyond
    its last step.

    explicit has the names of the flags that were typed.
    """
    batches, max_train_steps = training_set.batches, config.max_train_steps
    if isinstance(max_train_steps, str):
        images_per_step = batches.batch_size * batches.accumulation_steps
        max_train_steps = automatic_steps(len(training_set.dataset), images_per_step)
    total = total_steps(
        batches.epoch_length, batches.step_length, config.num_train_epochs, max_train_steps
    )
    if run.state.step > total:
        raise UserError(
            f"{run.output.checkpoint} is at step {run.state.step}, beyond the {total} of this run",
            "Raise --max_train_steps",
        )
    is_explicit = "lr_warmup_steps" in explicit
    if is_explicit and config.lr_warmup_steps and config.lr_scheduler == "constant":
        log.info("--lr_scheduler constant has no warm-up: take constant_with_warmup for one")
    warmup = warmup_steps(config.lr_scheduler, config.lr_warmup_steps, is_explicit, total)
    epochs = total * batches.step_length / batches.epoch_length
    return Schedule(total, warmup, epochs, batches.step_length)


def total_steps(count: int, effective_batch: int, epochs: int, max_train_steps: int | None) -> int:
    """Optimizer steps of a run: max_train_steps if given, else what the epochs amount to."""
    return max_train_steps or math.ceil(epochs * count / effective_batch)


def automatic_steps(num_images: int, images_per_step: int) -> int:
    """The most steps of --max_train_steps auto: more than a LoRA of these images needs, as held-out
    images end the run."""
    visits = min(max(VISITS_PER_IMAGE * num_images, MIN_VISITS), MAX_VISITS)
    return math.ceil(visits / images_per_step)


def warmup_steps(scheduler: str, requested: int, is_explicit: bool, total: int) -> int:
    """The warm-up in steps: none for constant; a default is cut to a tenth of the run."""
    if scheduler == "constant":
        return 0
    return requested if is_explicit else min(requested, total // 10)


def learning_rate(scheduler: str, peak: float, warmup: int, total: int) -> LearningRate:
    """The learning rate after a number of steps, by diffusers' scheduler of that name."""
    dummy = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule: Any = get_scheduler(
        scheduler, dummy, num_warmup_steps=warmup, num_training_steps=total
    )
    return lambda step: peak * schedule.lr_lambdas[0](step)


class Optimizer:
    """An optimizer over the LoRAs' parameters, with a learning rate of its own for each model.

    Args:
        prepared: torch's optimizer as accelerate prepared it.
        learning_rates: one for each of its parameter groups.
        scaler: the loss scaler of fp16.
    """

    def __init__(
        self,
        prepared: Any,
        learning_rates: Sequence[LearningRate],
        scaler: torch.amp.GradScaler | None,
    ):
        self._prepared, self.learning_rates, self._scaler = prepared, learning_rates, scaler
        self.torch_optimizer: torch.optim.Optimizer = prepared.optimizer

    def set_lr(self, step: int) -> None:
        """Set the learning rates of step 1, 2, ..."""
        for group, lr in zip(self._prepared.param_groups, self.learning_rates, strict=True):
            group["lr"] = lr(step - 1)

    def step_if_finite(self, gradient_norm: torch.Tensor) -> torch.Tensor:
        """Take a step unless the gradients' norm is not finite, free the gradients, and return
        whether it is finite (0-d).

        A loss scaler decides for itself. Without one, torch's fused AdamW reads the same flag that
        a scaler sets, on the device, so that nothing has to wait for the answer.
        """
        finite = torch.isfinite(gradient_norm)
        if self._scaler is None and self.torch_optimizer.defaults.get("fused"):
            self.torch_optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._prepared.step()
        elif self._scaler is not None or finite:
            self._prepared.step()
        self._prepared.zero_grad()
        return finite


def make_optimizer(
    adapters: Adapters, config: OptimizerConfig, schedule: Schedule, run: Run
) -> Optimizer:
    """An optimizer for the adapters."""
    groups: list[dict[str, Any]] = [
        {"params": adapters.unet_parameters, "lr": config.learning_rate}
    ]
    if adapters.text_encoder is not None:
        groups.append({"params": adapters.text_encoder_parameters, "lr": config.text_encoder_lr})
    torch_optimizer = create_optimizer(config, groups, run.device)
    learning_rates = [
        learning_rate(config.lr_scheduler, group["lr"], schedule.warmup_steps, schedule.total_steps)
        for group in groups
    ]
    return Optimizer(run.prepare_optimizer(torch_optimizer), learning_rates, run.scaler)


class SkippedSteps:
    """Counts the steps that were skipped because their gradients were not finite.

    Args:
        precision: accelerate's name of the run's precision.
        finer: names of precisions that the device has and that are worth a try instead.
    """

    def __init__(self, precision: str = "no", finer: Sequence[str] = ()) -> None:
        self.total = self._in_a_row = 0
        self._causes = ["--learning_rate too high", "--lora_alpha too high for --lora_rank"]
        if finer:
            self._causes.append(f"{precision} (try --mixed_precision {' or '.join(finer)})")

    def add(self, finite: Sequence[bool], last_step: int) -> list[int]:
        """Count the steps up to last_step by whether each was finite; returns those that were not.

        Raises UserError after PATIENCE of them in a row.
        """
        skipped = []
        for step, is_finite in enumerate(finite, start=last_step - len(finite) + 1):
            self._in_a_row = 0 if is_finite else self._in_a_row + 1
            if not is_finite:
                self.total += 1
                skipped.append(step)
            if self._in_a_row == PATIENCE:
                raise UserError(
                    f"The gradients were not finite in {PATIENCE} steps in a row, up to step "
                    f"{step}",
                    f"Likely causes: {', or '.join(self._causes)}. The last checkpoint is good",
                )
        return skipped

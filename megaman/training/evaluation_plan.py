"""When a run evaluates its LoRA on held-out images, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megaman.training.held_out import NUM_TIMESTEPS

MAX_EVALUATIONS = 10  # a run, by default
MAX_SHARE = 0.03  # of the run's time, by default
# What a forward pass costs as a share of a training step's time for an image: on the embedded base.
FORWARD_SHARE = 0.34


@dataclass(frozen=True)
class EvaluationPlan:
    """Every how many steps the held-out images are evaluated; num_images are evaluated each time,
    images_per_step are trained on in a step, and sample_passes times an image passes the UNet to
    generate sample images.

    The training images and the average (EMA), if there is one, are evaluated with every second
    evaluation; all of them after the last step.
    """

    eval_steps: int
    total_steps: int
    images_per_step: int
    sample_passes: int
    num_images: int
    has_ema: bool

    def is_due(self, step: int) -> bool:
        """Whether the held-out images are evaluated after this step; 0 is before the first."""
        return step % self.eval_steps == 0 or step == self.total_steps

    def is_full(self, step: int) -> bool:
        """Whether an evaluation after this step includes training images and average."""
        return step // self.eval_steps % 2 == 0 or step == self.total_steps

    def cost(self) -> int:
        """Noisy images that pass the UNet in all evaluations."""
        steps = {*range(0, self.total_steps, self.eval_steps), self.total_steps}
        passes = 0
        for step in steps:
            passes += 1
            if self.is_full(step):
                passes += 2 if self.has_ema and step else 1
        return passes * self.num_images * NUM_TIMESTEPS

    @property
    def share(self) -> float:
        """The estimated cost as a share of the time of training steps and sample images."""
        run = self.total_steps * self.images_per_step + self.sample_passes * FORWARD_SHARE
        return self.cost() * FORWARD_SHARE / run


def plan_evaluations(plan: EvaluationPlan, patience: int | None) -> EvaluationPlan:
    """The plan with the default eval_steps: as many evaluations as cost less than MAX_SHARE, but
    enough to stop early.

    It depends on settings alone and not on measured times, so that a run that starts once more
    makes the same evaluations.
    """
    fewest = 1 if patience is None else patience + 2
    for count in range(MAX_EVALUATIONS, fewest, -1):
        candidate = replace(plan, eval_steps=math.ceil(plan.total_steps / count))
        if candidate.share < MAX_SHARE:
            return candidate
    return replace(plan, eval_steps=math.ceil(plan.total_steps / fewest))

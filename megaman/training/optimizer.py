"""How many steps a run has, and the learning rate at each: pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler


def total_steps(count: int, effective_batch: int, epochs: int, max_train_steps: int | None) -> int:
    """Optimizer steps of a run: max_train_steps where it is given, else what the epochs come to."""
    return max_train_steps or math.ceil(epochs * count / effective_batch)


def warmup_steps(name: str, asked: int, given: bool, total: int) -> int:
    """The warm-up in steps: none for constant; where it was not given, the default is cut to a
    tenth of the run."""
    if name == "constant":
        return 0
    return asked if given else min(asked, total // 10)


def rate_at(name: str, peak: float, warmup: int, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the steps done, by diffusers' schedule of that name."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_scheduler(name, stand_in, num_warmup_steps=warmup, num_training_steps=total)
    return lambda step: peak * schedule.lr_lambdas[0](step)

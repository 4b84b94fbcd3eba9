"""Which pictures, which random numbers and which learning rate belong to which step: pure functions of seed and step.

A resumed run asks for its step and gets what the undisturbed one would have got; no random state has to be kept.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The pictures 0 ... count - 1 in this epoch's order, in batches; the last may be smaller, none is left out."""
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def batch_at(number: int, count: int, batch_size: int, seed: int) -> list[int]:
    """Batch number ... of an endless run of epochs: indices of pictures."""
    epoch, place = divmod(number, math.ceil(count / batch_size))
    return epoch_batches(count, batch_size, seed, epoch)[place]


def total_steps(count: int, batch_size: int, batches_a_step: int, epochs: int, max_train_steps: int | None) -> int:
    """Optimizer steps of a run: max_train_steps where it is given, else what the epochs come to."""
    return max_train_steps or math.ceil(epochs * math.ceil(count / batch_size) / batches_a_step)


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of everything random in one step of one process."""
    digest = hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def rate_at(name: str, peak: float, warmup: int, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the steps done, by diffusers' schedule of that name."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_scheduler(name, stand_in, num_warmup_steps=warmup, num_training_steps=total)
    return lambda step: peak * schedule.lr_lambdas[0](step)

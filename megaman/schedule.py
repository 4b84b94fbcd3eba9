"""Which picture, which random numbers and which learning rate come when: pure functions of the seed and the place.

A resumed run asks for its step and gets what the undisturbed one would have got; no random state has to be kept.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from functools import lru_cache

import torch
from diffusers.optimization import get_scheduler


@lru_cache(maxsize=4)  # two epochs each of the pictures and of the class pictures
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The pictures 0 ... count - 1, each once, in this epoch's order."""
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return tuple(order)


def picture_at(number: int, count: int, seed: int) -> int:
    """Which picture is seen as number ... of an endless row of epochs; a step may reach into the next epoch."""
    epoch, place = divmod(number, count)
    return epoch_order(count, seed, epoch)[place]


def total_steps(count: int, effective_batch: int, epochs: int, max_train_steps: int | None) -> int:
    """Optimizer steps of a run: max_train_steps where it is given, else what the epochs come to."""
    return max_train_steps or math.ceil(epochs * count / effective_batch)


def random_for(seed: int, number: int) -> torch.Generator:
    """What is random about picture number ... of the row: its crop, noise and timestep.

    It hangs on the number alone, so neither the split into micro-batches nor the device changes it.
    """
    return torch.Generator().manual_seed(_digest(f"{seed} {number}"))


def caption_random_for(seed: int, number: int) -> random.Random:
    """What is random about the caption of picture number ... of the row; apart from the rest, which it leaves as is."""
    return random.Random(f"caption {seed} {number}")


def class_seed(seed: int) -> int:
    """The seed of a run's class pictures, so that they come in an order and with noise of their own."""
    return _digest(f"class pictures {seed}")


def seed_dropout(seed: int, number: int) -> None:
    """Set torch's own random state, from which dropout draws, for the micro-batch that begins with picture
    number ... of the row.

    A stopped run, and one that computes a micro-batch again, drops the same. Other micro-batches of the same pictures
    drop something else: their masks are drawn for the whole batch.
    """
    torch.manual_seed(_digest(f"dropout {seed} {number}"))


def _digest(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) >> 1


def warmup_steps(name: str, asked: int, given: bool, total: int) -> int:
    """The warm-up in steps: none for constant; where it was not given, the default is cut to a tenth of the run."""
    if name == "constant":
        return 0
    return asked if given else min(asked, total // 10)


def rate_at(name: str, peak: float, warmup: int, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the steps done, by diffusers' schedule of that name."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_scheduler(name, stand_in, num_warmup_steps=warmup, num_training_steps=total)
    return lambda step: peak * schedule.lr_lambdas[0](step)

"""Which pictures make an optimizer step, with which random numbers, and the part that a process
computes in one go.

Everything is a pure function of the seed and the place. A resumed run asks for its step and gets
what the undisturbed one would have got, and the same whatever the number of processes; no random
state has to be kept.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@lru_cache(maxsize=4)  # two epochs each of the pictures and of the class pictures
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The pictures 0 ... count - 1, each once, in this epoch's order."""
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return tuple(order)


def picture_at(number: int, count: int, seed: int) -> int:
    """Which picture is seen as number ... of an endless row of epochs; a step may reach into the
    next epoch."""
    epoch, place = divmod(number, count)
    return epoch_order(count, seed, epoch)[place]


def random_for(seed: int, number: int) -> torch.Generator:
    """What is random about picture number ... of the row: its crop, noise and timestep.

    It hangs on the number alone, so neither the split into micro-batches nor the device changes it.
    """
    return torch.Generator().manual_seed(_digest(f"{seed} {number}"))


def caption_random_for(seed: int, number: int) -> random.Random:
    """What is random about the caption of picture number ... of the row; apart from the rest, which
    it leaves as is."""
    return random.Random(f"caption {seed} {number}")


def class_seed(seed: int) -> int:
    """The seed of a run's class pictures, so that they come in an order and with noise of their
    own."""
    return _digest(f"class pictures {seed}")


def seed_dropout(seed: int, number: int) -> None:
    """Set torch's own random state, from which dropout draws, for the micro-batch that begins with
    picture number ... of the row.

    A stopped run, and one that computes a micro-batch again, drops the same. Other micro-batches of
    the same pictures drop something else: their masks are drawn for the whole batch.
    """
    torch.manual_seed(_digest(f"dropout {seed} {number}"))


def _digest(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class Part:
    """What one process computes in one go: the numbers that its pictures have in the run, on which
    what is random about them hangs (batches.random_for), and the pictures.

    The mean of their losses is divided by divisor. The sum over a step's parts, averaged over the
    processes as DDP does with gradients, is then the mean over all the pictures of the step. It is
    infinite for a picture that only stands in where a process would have none: each has to take
    part in the exchange.
    """

    numbers: tuple[int, ...]
    pictures: tuple[int, ...]
    divisor: float


class Batches:
    """The batches of a run; buckets tells the bucket of each picture, or is None where all are of
    one size.

    A batch is what all the processes compute between them, size pictures each; accumulated of them
    make a step.

    Without buckets the pictures come in one endless row of epochs, and a batch may reach into the
    next epoch. With buckets a batch holds pictures of one bucket, in every epoch other ones in
    another order; what is left over in a bucket makes a smaller batch, so that each picture comes
    exactly once an epoch. A step may reach into the next one.
    """

    def __init__(
        self,
        count: int,
        buckets: Sequence[Hashable] | None,
        size: int,
        accumulated: int,
        processes: int,
        seed: int,
    ):
        self.count, self.buckets, self.seed = count, buckets, seed
        self.at_once, self.accumulated, self.processes = size * processes, accumulated, processes
        self._epoch = lru_cache(maxsize=2)(self._epoch_in_buckets)
        # What an epoch is and what a step takes of it: in pictures, or in batches where these
        # differ in size.
        self.epoch_length, self.step_length = count, self.at_once * accumulated
        if buckets is not None:
            self.epoch_length, self.step_length = len(self._epoch(0)), accumulated

    def parts(self, step: int, process: int, size: int) -> list[Part]:
        """What this process computes in step 1, 2, ...; with at most size pictures at once.

        With several processes size has to be that of the batches, so that each has the same number
        of parts.
        """
        batches = [
            self._batch(number)
            for number in range((step - 1) * self.accumulated, step * self.accumulated)
        ]
        total, parts = sum(len(pictures) for _, pictures in batches), []
        for first, pictures in batches:
            start, stop = (
                len(pictures) * place // self.processes for place in (process, process + 1)
            )
            if start == stop:
                parts.append(Part((first,), pictures[:1], math.inf))
            for low in range(start, stop, size):
                high = min(low + size, stop)
                numbers = tuple(range(first + low, first + high))
                parts.append(
                    Part(numbers, pictures[low:high], total / ((high - low) * self.processes))
                )
        return parts

    def _batch(self, number: int) -> tuple[int, tuple[int, ...]]:
        """The number in the run of a batch's first picture, and its pictures."""
        if self.buckets is None:
            first = number * self.at_once
            places = range(first, first + self.at_once)
            return first, tuple(picture_at(place, self.count, self.seed) for place in places)
        epoch, place = divmod(number, self.epoch_length)
        first, pictures = self._epoch(epoch)[place]
        return epoch * self.count + first, pictures

    def _epoch_in_buckets(self, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
        """The batches of an epoch, each with the place of its first picture."""
        members: dict[Hashable, list[int]] = {}
        for picture in epoch_order(self.count, self.seed, epoch):
            members.setdefault(self.buckets[picture], []).append(picture)
        batches = [
            tuple(pictures[low : low + self.at_once])
            for pictures in members.values()
            for low in range(0, len(pictures), self.at_once)
        ]
        random.Random(f"batches {self.seed} {epoch}").shuffle(batches)
        firsts = [0]
        for pictures in batches:
            firsts.append(firsts[-1] + len(pictures))
        return list(zip(firsts[:-1], batches, strict=True))

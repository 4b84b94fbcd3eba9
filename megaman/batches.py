"""Which pictures make an optimizer step: its batches, and the part of each that a process computes in one go.

Everything is a pure function of the seed and the place, as in schedule.py, so that a resumed run goes on as it would
have, and the same whatever the number of processes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megaman.schedule import epoch_order, picture_at


@dataclass(frozen=True)
class Part:
    """What one process computes in one go: the numbers that its pictures have in the run, on which what is random
    about them hangs (schedule.random_for), and the pictures.

    The mean of their losses is divided by divisor. The sum over a step's parts, averaged over the processes as DDP
    does with gradients, is then the mean over all the pictures of the step. It is infinite for a picture that only
    stands in where a process would have none: each has to take part in the exchange.
    """

    numbers: tuple[int, ...]
    pictures: tuple[int, ...]
    divisor: float


class Batches:
    """The batches of a run; buckets tells the bucket of each picture, or is None where all are of one size.

    A batch is what all the processes compute between them, size pictures each; accumulated of them make a step.

    Without buckets the pictures come in one endless row of epochs, and a batch may reach into the next epoch. With
    buckets a batch holds pictures of one bucket, in every epoch other ones in another order; what is left over in a
    bucket makes a smaller batch, so that each picture comes exactly once an epoch. A step may reach into the next one.
    """

    def __init__(
        self, count: int, buckets: Sequence[Hashable] | None, size: int, accumulated: int, processes: int, seed: int
    ):
        self.count, self.buckets, self.seed = count, buckets, seed
        self.at_once, self.accumulated, self.processes = size * processes, accumulated, processes
        self._epoch = lru_cache(maxsize=2)(self._epoch_in_buckets)
        # What an epoch is and what a step takes of it: in pictures, or in batches where these differ in size.
        self.epoch_length, self.step_length = count, self.at_once * accumulated
        if buckets is not None:
            self.epoch_length, self.step_length = len(self._epoch(0)), accumulated

    def parts(self, step: int, process: int, size: int) -> list[Part]:
        """What this process computes in step 1, 2, ...; with at most size pictures at once.

        With several processes size has to be that of the batches, so that each has the same number of parts.
        """
        batches = [self._batch(number) for number in range((step - 1) * self.accumulated, step * self.accumulated)]
        total, parts = sum(len(pictures) for _, pictures in batches), []
        for first, pictures in batches:
            start, stop = (len(pictures) * place // self.processes for place in (process, process + 1))
            if start == stop:
                parts.append(Part((first,), pictures[:1], math.inf))
            for low in range(start, stop, size):
                high = min(low + size, stop)
                numbers = tuple(range(first + low, first + high))
                parts.append(Part(numbers, pictures[low:high], total / ((high - low) * self.processes)))
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

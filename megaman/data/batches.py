"""Which images make up an optimizer step, with which random numbers, split into micro-batches.

Everything is a pure function of the seed and the sample index: the position of a sample in the
endless sequence of epochs. A resumed run asks for its step and gets exactly what the uninterrupted
run would have got, whatever the number of processes; no random state has to be saved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


@lru_cache(maxsize=4)  # two epochs each of the training images and of the class images
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The positions 0 ... count - 1, each once, in the order of this epoch."""
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return tuple(order)


def position_at(sample_index: int, count: int, seed: int) -> int:
    """The position in an epoch of count images that a sample index stands for."""
    epoch, place = divmod(sample_index, count)
    return epoch_order(count, seed, epoch)[place]


def generator_for(seed: int, sample_index: int) -> torch.Generator:
    """The random numbers of a sample: its crop, noise and timestep.

    They depend on the sample index alone, so neither the split into micro-batches nor the device
    changes them.
    """
    return torch.Generator().manual_seed(_digest(f"{seed} {sample_index}"))


def caption_rng_for(seed: int, sample_index: int) -> random.Random:
    """The random numbers of a sample's caption, independent of `generator_for`."""
    return random.Random(f"caption {seed} {sample_index}")


def class_seed(seed: int) -> int:
    """The seed for a run's class images, which gives them an order and noise of their own."""
    return _digest(f"class pictures {seed}")


def seed_dropout(seed: int, sample_index: int) -> None:
    """Seed torch's global generator, which dropout uses, for the micro-batch that starts with this
    sample.

    A resumed run and a repeated micro-batch drop the same inputs. Other micro-batches of the same
    images drop others, because the mask is generated for a whole batch.
    """
    torch.manual_seed(_digest(f"dropout {seed} {sample_index}"))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class MicroBatch:
    """The samples that one process computes in one forward and backward pass.

    sample_indices seed the random numbers of each sample (`generator_for`); positions are the
    images' positions in the epoch.

    The mean loss is divided by divisor. The sum over a step's micro-batches, of all processes, is
    then the mean loss over all images of the step.
    """

    sample_indices: tuple[int, ...]
    positions: tuple[int, ...]
    divisor: float


class _Batch(NamedTuple):
    """The sample index of a batch's first image, and the positions of all its images."""

    first: int
    positions: tuple[int, ...]


class Batches:
    """The batches of a run. All processes together compute a batch of batch_size images;
    accumulation_steps batches make a step.

    Without buckets the images come in one endless sequence of epochs, and a batch may reach into
    the next epoch. With buckets a batch holds images of one bucket, mixed anew in every epoch; the
    rest of a bucket makes a smaller batch, so that each image comes exactly once per epoch. A step
    may reach into the next epoch.

    Args:
        count: images per epoch.
        buckets: the bucket of each image, or None if all images have the same size.
    """

    def __init__(
        self,
        count: int,
        buckets: Sequence[Hashable] | None,
        batch_size: int,
        accumulation_steps: int,
        world_size: int,
        seed: int,
    ):
        self.count, self.seed = count, seed
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.world_size = world_size
        # The length of an epoch and of a step: in images, or in batches if these differ in size.
        if buckets is None:
            self._bucketed_epoch = None
            self.epoch_length = count
            self.step_length = self.batch_size * accumulation_steps
        else:
            self._bucketed_epoch = lru_cache(maxsize=2)(
                lambda epoch: _batches_by_bucket(buckets, self.batch_size, seed, epoch)
            )
            self.epoch_length = len(self._bucketed_epoch(0))
            self.step_length = accumulation_steps

    def micro_batches(self, step: int, rank: int, size: int) -> list[MicroBatch]:
        """What the process with this rank computes in step 1, 2, ...: micro-batches of at most size
        images; none if the step has fewer images than there are processes.
        """
        numbers = range((step - 1) * self.accumulation_steps, step * self.accumulation_steps)
        batches = [self._batch(number) for number in numbers]
        step_images = sum(len(batch.positions) for batch in batches)
        micro_batches = []
        for batch in batches:
            micro_batches += self._share(batch, rank, size, step_images)
        return micro_batches

    def _share(self, batch: _Batch, rank: int, size: int, step_images: int) -> list[MicroBatch]:
        """The micro-batches that one process computes of a batch."""
        first, positions = batch
        start = len(positions) * rank // self.world_size
        stop = len(positions) * (rank + 1) // self.world_size
        micro_batches = []
        for low in range(start, stop, size):
            high = min(low + size, stop)
            sample_indices = tuple(range(first + low, first + high))
            divisor = step_images / (high - low)
            micro_batches.append(MicroBatch(sample_indices, positions[low:high], divisor))
        return micro_batches

    def _batch(self, number: int) -> _Batch:
        """Batch 0, 1, ... of the run."""
        if self._bucketed_epoch is None:
            first = number * self.batch_size
            samples = range(first, first + self.batch_size)
            return _Batch(first, tuple(position_at(i, self.count, self.seed) for i in samples))
        epoch, place = divmod(number, self.epoch_length)
        first, positions = self._bucketed_epoch(epoch)[place]
        return _Batch(epoch * self.count + first, positions)


def _batches_by_bucket(
    buckets: Sequence[Hashable], batch_size: int, seed: int, epoch: int
) -> list[_Batch]:
    """The batches of one epoch; each batch's first is counted from the start of the epoch."""
    members: dict[Hashable, list[int]] = {}
    for position in epoch_order(len(buckets), seed, epoch):
        members.setdefault(buckets[position], []).append(position)
    batches: list[tuple[int, ...]] = []
    for positions in members.values():
        starts = range(0, len(positions), batch_size)
        batches += [tuple(positions[start : start + batch_size]) for start in starts]
    random.Random(f"batches {seed} {epoch}").shuffle(batches)
    numbered, first = [], 0
    for positions in batches:
        numbered.append(_Batch(first, positions))
        first += len(positions)
    return numbered

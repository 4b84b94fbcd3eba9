"""Batches and micro-batches: no image missed or doubled, no batch of mixed sizes, the same whatever
the number of processes."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.data.batches import Batches, position_at
from megaman.data.buckets import make_buckets

SD15 = make_buckets(512, 512, None, None, None, True)
SIDE = st.integers(16, 5000)
SIZES = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=40)


@given(
    SIZES,
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.integers(0, 50),
    st.booleans(),
)
def test_every_picture_exactly_once_an_epoch(
    sizes, batch_size, world_size, accumulation_steps, micro_batch_size, seed, epoch, upscale
):
    """Whatever the sizes, the batch, the processes and the accumulation; and no batch mixes
    sizes."""
    buckets = make_buckets(512, 512, None, None, None, upscale)
    shapes = [buckets.size_for(*size) for size in sizes]
    whole = batch_size * world_size
    batches = Batches(len(shapes), shapes, whole, accumulation_steps, world_size, seed)
    # So many steps end where an epoch does.
    steps = math.lcm(batches.epoch_length, accumulation_steps) // accumulation_steps
    epochs = steps * accumulation_steps // batches.epoch_length
    positions, sample_indices = Counter(), Counter()
    for step in range(1 + epoch * steps, 1 + (epoch + 1) * steps):
        weights = Counter()
        for rank in range(world_size):
            for each in batches.micro_batches(step, rank, micro_batch_size):
                size = len(each.positions)
                assert 1 <= size == len(each.sample_indices) <= micro_batch_size
                assert len({shapes[position] for position in each.positions}) == 1
                positions.update(each.positions)
                sample_indices.update(each.sample_indices)
                weight = 1 / size / each.divisor
                weights.update(dict.fromkeys(each.sample_indices, weight))
        assert sum(weights.values()) == pytest.approx(1)
        assert max(weights.values()) == pytest.approx(min(weights.values())), (
            "every image of a step counts the same"
        )
    assert positions == Counter(dict.fromkeys(range(len(shapes)), epochs))
    first = epoch * epochs * len(shapes)
    assert sample_indices == Counter(range(first, first + epochs * len(shapes))), (
        "each with random numbers of its own"
    )


@given(SIZES, st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**40))
def test_processes_and_parts_share_the_same_batches(sizes, batch_size, accumulation_steps, seed):
    """One process with batches of 4 x batch_size, or four with batch_size each, or smaller parts of
    them: the same images with the same random numbers in each step; and what was asked before makes
    no difference."""
    shapes = [SD15.size_for(*size) for size in sizes]

    def samples(step: int, world_size: int, micro_batch_size: int) -> list[tuple[int, int]]:
        batches = Batches(len(shapes), shapes, 4 * batch_size, accumulation_steps, world_size, seed)
        pairs: list[tuple[int, int]] = []
        for rank in range(world_size):
            for each in batches.micro_batches(step, rank, micro_batch_size):
                pairs += zip(each.sample_indices, each.positions, strict=True)
        return sorted(pairs)

    for step in (7, 1, 100):
        whole = samples(step, 1, 4 * batch_size)
        assert whole == samples(step, 4, batch_size) == samples(step, 1, 1)


def test_epochs_and_seeds_have_their_own_batches():
    shapes = [(64, 64)] * 9 + [(32, 128)] * 4
    orders = set()
    for seed, epoch in product(range(5), range(5)):
        batches = Batches(len(shapes), shapes, 2, 1, 1, seed)
        assert batches.epoch_length == 7
        steps = range(1 + 7 * epoch, 8 + 7 * epoch)
        orders.add(tuple(batches.micro_batches(step, 0, 2)[0].positions for step in steps))
    assert len(orders) == 25


@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0),
)
def test_without_buckets_the_pictures_come_in_one_endless_row(
    count, size, accumulation_steps, world_size, step, seed
):
    """The order that runs without buckets have always had, and no micro-batch smaller than
    another."""
    batches = Batches(count, None, size * world_size, accumulation_steps, world_size, seed)
    assert batches.epoch_length == count
    assert batches.step_length == size * accumulation_steps * world_size
    for rank in range(world_size):
        for number, micro_batch in enumerate(batches.micro_batches(step, rank, size)):
            first = (((step - 1) * accumulation_steps + number) * world_size + rank) * size
            samples = range(first, first + size)
            assert micro_batch.sample_indices == tuple(samples)
            assert micro_batch.positions == tuple(position_at(i, count, seed) for i in samples)
            assert micro_batch.divisor == accumulation_steps * world_size

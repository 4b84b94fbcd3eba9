"""Curves for people: smoothed, and thinned to as many points as a screen can show. Needs no
torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

SMOOTHING = 0.98  # of the former mean in the next one: about the last 50 steps count
MAX_POINTS = 600  # of a curve on the page

Value = float | None  # None is a number that was not finite


class Thinned(NamedTuple):
    """The smallest, the mean and the largest value of each bucket of steps."""

    low: list[Value]
    mean: list[Value]
    high: list[Value]


class Smoothed:
    """An exponential moving average without the bias of its start (Adam's correction)."""

    def __init__(self) -> None:
        self.values: list[Value] = []  # after each value that was added
        self._mean, self._weight = 0.0, 0.0

    def add(self, value: Value) -> None:
        """Add a value; one that was not finite changes nothing."""
        if value is not None:
            self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * value
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.values.append(self._mean / self._weight if self._weight else None)


def bucket_ends(count: int, most: int = MAX_POINTS) -> list[int]:
    """The ends (exclusive) of at most so many buckets of about the same length."""
    num_buckets = min(count, most)
    return [count * (i + 1) // num_buckets for i in range(num_buckets)]


def thin(values: Sequence[Value], ends: Sequence[int]) -> Thinned:
    """The values by bucket."""
    thinned = Thinned([], [], [])
    for bucket in _buckets(values, ends):
        finite = [value for value in bucket if value is not None]
        thinned.low.append(_short(min(finite, default=None)))
        thinned.high.append(_short(max(finite, default=None)))
        thinned.mean.append(_short(sum(finite) / len(finite)) if finite else None)
    return thinned


def last_of_each(values: Sequence[Value], ends: Sequence[int]) -> list[Value]:
    """The last value of each bucket."""
    return [_short(values[end - 1]) for end in ends]


def _buckets(values: Sequence[Value], ends: Sequence[int]) -> Iterator[Sequence[Value]]:
    start = 0
    for end in ends:
        yield values[start:end]
        start = end


def _short(value: Value) -> Value:
    """Five significant digits, which no screen shows more of."""
    return None if value is None else float(f"{value:.5g}")

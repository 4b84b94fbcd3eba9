"""Evenly spaced items: of captions, of images to look at, of what a page has room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spaced, the first among them."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]

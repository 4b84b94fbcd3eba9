"""Aspect-ratio buckets: the sizes in which pictures of any shape are trained on, about as many
pixels in each.

The idea is NovelAI's ("Improvements on Stable Diffusion", 2022); names, sizes and defaults are
those of kohya's scripts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megaman.config.train import contradiction
from megaman.errors import UserError

GRAIN = 8  # pixels: what a side of latents stands for in every Stable Diffusion 1.x
MOST_TOLD = 12  # buckets in a line
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Buckets:
    """The sizes there are, and which of them a picture goes to.

    area is the most pixels of any bucket; step what every side is a multiple of; smallest and
    largest are the limits of a side; upscale tells whether a picture may be enlarged.
    """

    sizes: tuple[Size, ...]
    area: int
    step: int
    smallest: int
    largest: int
    upscale: bool = True

    def size_for(self, width: int, height: int) -> Size:
        """The bucket of a picture of this size: the one of the nearest aspect ratio, so that the
        crop loses least.

        kohya's scripts compare the ratios' difference; here it is their quotient, so that tall and
        wide are alike. Without upscale a picture that its bucket would enlarge gets its own size,
        sides rounded down to the step, as in kohya's; only sides below one step are enlarged to it.
        """
        chosen = max(
            self.sizes, key=lambda size: (_kept(width, height, size), size[0] * size[1], -max(size))
        )
        if self.upscale or (chosen[0] <= width and chosen[1] <= height):
            return chosen
        return self._own_size(width, height)

    def _own_size(self, width: int, height: int) -> Size:
        shrunk = min(
            1.0, math.sqrt(self.area / (width * height)), self.largest / max(width, height)
        )
        sides = [
            max(self.step, int(side * shrunk) // self.step * self.step) for side in (width, height)
        ]
        short = min(sides)  # where it was enlarged to one step, the area may be too large
        most = max(self.step, self.area // short // self.step * self.step)
        return min(sides[0], most), min(sides[1], most)


def _kept(width: int, height: int, size: Size) -> float:
    """The share of a picture that the largest crop of the bucket's shape keeps."""
    one, other = width * size[1], height * size[0]
    return min(one, other) / max(one, other)


def make_buckets(
    resolution: int,
    native: int,
    smallest: int | None,
    largest: int | None,
    step: int | None,
    upscale: bool,
) -> Buckets:
    """The buckets with at most resolution x resolution pixels: for every width the greatest height
    that fits, and both the other way round.

    What is None follows from native, the side in pixels that the base was made for: half of it,
    twice and an eighth, which are kohya's 256, 1024 and 64 for Stable Diffusion 1.5. The square is
    always there. Raises UserError where the limits leave no room for it.
    """
    if mistake := contradiction(resolution, smallest, largest, step):
        raise UserError(*mistake)
    step = step or max(GRAIN, min(native // 8, resolution) // GRAIN * GRAIN)
    smallest = smallest or max(step, min(native, resolution) // 2 // step * step)
    largest = largest or max(2 * native, resolution)
    area, square = resolution**2, resolution // step * step
    sides = range(math.ceil(smallest / step) * step, largest + 1, step)
    tall = {(side, min(largest, area // side) // step * step) for side in sides if side <= square}
    sizes = tall | {(height, width) for width, height in tall} | {(square, square)}
    return Buckets(tuple(sorted(sizes)), area, step, smallest, largest, upscale)


def record(buckets: Buckets, sizes: Iterable[Size]) -> dict[str, Any]:
    """The limits that were taken and how many pictures each bucket has, for
    training_config.json."""
    counted = {
        f"{width}x{height}": count for (width, height), count in sorted(Counter(sizes).items())
    }
    return {
        "min_bucket_reso": buckets.smallest,
        "max_bucket_reso": buckets.largest,
        "bucket_reso_steps": buckets.step,
        "pictures": counted,
    }


def in_words(sizes: Iterable[Size]) -> str:
    """How many pictures each bucket has, as a line; the fullest first, and not each of very
    many."""
    counted = Counter(sizes).most_common()
    told = [f"{width}x{height}: {count}" for (width, height), count in counted[:MOST_TOLD]]
    return ", ".join(told) + (
        f" and {len(counted) - MOST_TOLD} more" if counted[MOST_TOLD:] else ""
    )

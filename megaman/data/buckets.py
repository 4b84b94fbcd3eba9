"""Aspect-ratio buckets: the sizes at which images of any shape are trained, all with about the same
number of pixels.

The idea is NovelAI's ("Improvements on Stable Diffusion", 2022); names, sizes and defaults are
those of kohya's scripts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megaman.config.image_settings import contradiction
from megaman.errors import UserError

GRAIN = 8  # pixels per side of one latent cell in every Stable Diffusion 1.x
MAX_SHOWN = 12  # buckets in a line
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True)
class Buckets:
    """The sizes, and which of them an image is assigned to.

    Args:
        sizes: width and height of every bucket.
        area: the largest number of pixels of a bucket.
        step: every side is a multiple of this.
        smallest: lower limit of a side in pixels.
        largest: upper limit of a side in pixels.
        upscale: whether images may be enlarged.
    """

    sizes: tuple[Size, ...]
    area: int
    step: int
    smallest: int
    largest: int
    upscale: bool = True

    def size_for(self, width: int, height: int) -> Size:
        """The bucket for an image of this size: the one with the nearest aspect ratio, so that the
        crop loses the least.

        kohya's scripts compare the difference of the ratios; here it is their quotient, which
        treats tall and wide alike. Without upscale, an image that its bucket would enlarge gets its
        own size, sides rounded down to the step, as in kohya's scripts; only sides below one step
        are enlarged to it.
        """

        def preference(size: Size) -> tuple[float, int, int]:
            return _kept_share(width, height, size), size[0] * size[1], -max(size)

        nearest = max(self.sizes, key=preference)
        if self.upscale or (nearest[0] <= width and nearest[1] <= height):
            return nearest
        return self._own_size(width, height)

    def _own_size(self, width: int, height: int) -> Size:
        by_area = math.sqrt(self.area / (width * height))
        scale = min(1.0, by_area, self.largest / max(width, height))
        rounded = [int(side * scale) // self.step * self.step for side in (width, height)]
        sides = [max(self.step, side) for side in rounded]
        # The area can be too large if the short side was enlarged to one step.
        limit = max(self.step, self.area // min(sides) // self.step * self.step)
        return min(sides[0], limit), min(sides[1], limit)


def _kept_share(width: int, height: int, size: Size) -> float:
    """The share of an image that the largest crop of the bucket's shape keeps."""
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
    that fits, and the same for every height.

    Limits that are None follow from native, the side in pixels that the base was made for: half of
    it, twice and an eighth, which are kohya's 256, 1024 and 64 for Stable Diffusion 1.5. The square
    is always included. Raises UserError if the limits leave no room for it.
    """
    if error := contradiction(resolution, smallest, largest, step):
        raise UserError(*error)
    step = step or max(GRAIN, min(native // 8, resolution) // GRAIN * GRAIN)
    smallest = smallest or max(step, min(native, resolution) // 2 // step * step)
    largest = largest or max(2 * native, resolution)
    area, square = resolution**2, resolution // step * step
    sides = range(math.ceil(smallest / step) * step, largest + 1, step)
    tall = {(side, min(largest, area // side) // step * step) for side in sides if side <= square}
    sizes = tall | {(height, width) for width, height in tall} | {(square, square)}
    return Buckets(tuple(sorted(sizes)), area, step, smallest, largest, upscale)


def record(buckets: Buckets, sizes: Iterable[Size]) -> dict[str, Any]:
    """The limits in use and the number of images per bucket, for training_config.json."""
    counts = sorted(Counter(sizes).items())
    return {
        "min_bucket_reso": buckets.smallest,
        "max_bucket_reso": buckets.largest,
        "bucket_reso_steps": buckets.step,
        "pictures": {f"{width}x{height}": count for (width, height), count in counts},
    }


def summary(sizes: Iterable[Size]) -> str:
    """How many images each bucket has, in one line; the fullest first, and MAX_SHOWN at most."""
    counts = Counter(sizes).most_common()
    shown = [f"{width}x{height}: {count}" for (width, height), count in counts[:MAX_SHOWN]]
    line = ", ".join(shown)
    return f"{line} and {len(counts) - MAX_SHOWN} more" if len(counts) > MAX_SHOWN else line

"""Near-duplicates among pictures: copies that were resized, compressed again, mirrored or slightly
cropped.

Each picture is a small copy of itself, uint8 [N, S, S, 3], the whole of it squeezed into a square.
Candidates come from the distances between all pictures at 8 x 8, as one matrix product; each of
them is then laid over the other at 16 x 16, and the place where they differ most decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Crop = tuple[float, float, float, float]  # shares cut off left, top, right and bottom

COARSE = 8  # side at which candidates are sought
ROWS = 256  # pictures that are compared with all the others at a time: what bounds the memory
# Crops that are tried for candidates. What lies between them is near enough.
CROPS = [
    (0, 0, 0, 0),
    (0.05, 0.05, 0.05, 0.05),
    (0.1, 0, 0, 0),
    (0, 0.1, 0, 0),
    (0, 0, 0.1, 0),
    (0, 0, 0, 0.1),
    (0.08, 0.08, 0, 0),
    (0, 0.08, 0.08, 0),
    (0.08, 0, 0, 0.08),
    (0, 0, 0.08, 0.08),
]
VIEWS = [(crop, mirrored) for crop in CROPS for mirrored in (False, True)]
NEAREST = (
    8  # candidates of a picture: a thousand pictures before one background are all alike at 8 x 8
)
MOST_CROPPED = 0.15  # of a side
ALIKE, NOISE = (
    0.3,
    3.0,
)  # candidates differ by so much of their contrast (as variances), or by so many levels
# side at which they are laid over one another, a third of their own: shifts are then parts of a
# pixel
FINE = 16
CELL = 4  # pixels of the squares in which two pictures laid over one another are compared
SAME_EDGE = 0.01  # a crop below this share is none
EXPLAINED = (
    1.4  # times nearer must a crop bring two pictures: else another difference was what it fitted
)
# What two pictures may differ by in the worst cell and on average: levels of 255, for compression
# and scaling, and on top a share of the contrast where they were cropped, since they then fit to a
# part of a pixel only. Of 1,000 planted copies the whole ones came out within 3 levels in the worst
# cell, the cropped ones within 4 and 0.06 of the contrast.
LEVELS, WORST_CROPPED, MEAN_CROPPED = 4.0, 0.08, 0.02


class Pair(NamedTuple):
    """Two pictures, by number, of which the second is nearly the first: mirrored, or showing less
    or more of it."""

    first: int
    second: int
    mirrored: bool
    cropped: bool


def near_duplicates(small: np.ndarray) -> list[Pair]:
    """The pairs of near-duplicates among the pictures uint8 [N, S, S, 3], each once.

    Time grows with the square of N, memory with N. Of a picture with many copies only the NEAREST
    are paired with it.
    """
    found: dict[tuple[int, int], Pair | None] = {}
    for inner, outer, mirrored, crop in candidates(small) if len(small) > 1 else ():
        key = (min(inner, outer), max(inner, outer))
        if found.get(key) is None:
            crop = laid_over(small[inner], small[outer], mirrored, crop)
            found[key] = (
                None if crop is None else Pair(*key, mirrored, max(map(abs, crop)) > SAME_EDGE)
            )
    return sorted(filter(None, found.values()))


def candidates(small: np.ndarray) -> Iterator[tuple[int, int, bool, Crop]]:
    """(inner, outer, mirrored, crop): the inner picture looks at 8 x 8 much like that crop of the
    outer one.

    They are the NEAREST of every outer picture, with the crop under which they come nearest.
    """
    coarse = _shrunk(small, CROPS[0]).reshape(len(small), 3 * COARSE**2)
    middle, width = coarse.mean(), coarse.shape[1]
    coarse -= middle  # keeps the squares small, and with them what float32 rounds off
    squares, contrast = (coarse**2).sum(1), coarse.reshape(len(small), -1, 3).var(1).mean(1)
    for start in range(0, len(small), ROWS):
        rows = small[start : start + ROWS]
        limits = ALIKE * np.minimum(contrast[start : start + ROWS, None], contrast) + NOISE**2
        nearest, which = np.full(limits.shape, np.inf, np.float32), np.zeros(limits.shape, np.uint8)
        for number, (crop, mirrored) in enumerate(VIEWS):
            seen = (
                _shrunk(rows[:, :, ::-1] if mirrored else rows, crop).reshape(len(rows), width)
                - middle
            )
            distance = ((seen**2).sum(1)[:, None] + squares - 2 * seen @ coarse.T) / width
            better = distance < nearest
            nearest[better], which[better] = distance[better], number
        nearest[np.arange(len(rows)), start + np.arange(len(rows))] = (
            np.inf
        )  # nothing is its own duplicate
        nearest /= limits
        kept = min(NEAREST, len(small)) - 1
        for row, columns in enumerate(
            np.argpartition(nearest, kept, axis=1)[:, : kept + 1].tolist()
        ):
            for column in columns:
                if nearest[row, column] <= 1:
                    crop, mirrored = VIEWS[which[row, column]]
                    yield column, start + row, mirrored, crop


def _shrunk(small: np.ndarray, crop: Crop, side: int = COARSE) -> np.ndarray:
    """That crop of every picture [N, S, S, 3] as float32 [N, side, side, 3], by area averages: two
    small matrices."""
    count, height, width, _ = small.shape
    left, top, right, bottom = crop
    across, down = _averages(width, left, 1 - right, side), _averages(height, top, 1 - bottom, side)
    shrunk = np.empty((count, side, side, 3), np.float32)
    for start in range(0, count, ROWS):
        part = small[start : start + ROWS].astype(np.float32)
        rows = (down @ part.reshape(len(part), height, width * 3)).reshape(
            len(part), side, width, 3
        )
        shrunk[start : start + ROWS] = across @ rows
    return shrunk


@lru_cache(4096)
def _averages(pixels: int, start: float, end: float, side: int) -> np.ndarray:
    """float32 [side, pixels]: each row averages the pixels that one of side equal parts of start
    ... end covers.

    Start and end are shares of the whole; beyond 0 and 1 the outermost pixel goes on.
    """
    edges = (start + (end - start) * np.arange(side + 1) / side) * pixels
    place = np.arange(pixels)
    weights = np.minimum(edges[1:, None], place + 1) - np.maximum(edges[:-1, None], place)
    weights = weights.clip(0)
    weights[:, 0] += (np.minimum(edges[1:], 0) - np.minimum(edges[:-1], 0)).clip(0)
    weights[:, -1] += (np.maximum(edges[1:], pixels) - np.maximum(edges[:-1], pixels)).clip(0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def laid_over(inner: np.ndarray, outer: np.ndarray, mirrored: bool, crop: Crop) -> Crop | None:
    """The crop of the outer picture (mirrored first) that the inner one shows, or None where they
    are not alike.

    Both are uint8 [S, S, 3]. From the crop given, the edges are moved in turn, in steps that are
    halved, as long as the pictures come nearer.
    """
    side = FINE
    wanted = _shrunk(inner[None], (0, 0, 0, 0), side)[0]
    whole = (outer[:, ::-1] if mirrored else outer)[None]

    def distance(crop: Crop) -> float:
        return float(((_shrunk(whole, crop, side)[0] - wanted) ** 2).mean())

    uncropped, best, step = distance(CROPS[0]), distance(crop), 0.04
    while step >= 0.005:
        nearer = False
        for edge in range(4):
            for move in (-step, step):
                tried = tuple(share + move * (edge == i) for i, share in enumerate(crop))
                if -0.02 <= tried[edge] <= MOST_CROPPED and (value := distance(tried)) < best:
                    best, crop, nearer = value, tried, True
        if not nearer:
            step /= 2
    cropped = max(map(abs, crop)) > SAME_EDGE and best * EXPLAINED < uncropped
    return crop if _alike(_shrunk(whole, crop, side)[0], wanted, cropped) else None


def _alike(one: np.ndarray, other: np.ndarray, cropped: bool) -> bool:
    """Whether two float pictures [S, S, 3] differ nowhere by more than compression, scaling and
    cropping explain."""
    cells = (
        np.abs(one - other)
        .reshape(len(one) // CELL, CELL, len(one) // CELL, CELL, 3)
        .mean((1, 3, 4))
    )
    contrast = cropped * min(one.std((0, 1)).mean(), other.std((0, 1)).mean())
    return bool(
        cells.max() <= WORST_CROPPED * contrast + LEVELS
        and cells.mean() <= MEAN_CROPPED * contrast + LEVELS
    )

"""Near-duplicates among images: copies that were resized, recompressed, mirrored or slightly
cropped.

Each image is represented by a thumbnail of the whole, uint8 [N, S, S, 3], squeezed into a square.
Candidates come from the distances between all images at 8 x 8, as one matrix product; each
candidate is then aligned with the other image at 16 x 16, and the place where they differ most
decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np


class CropShares(NamedTuple):
    """The shares of an image's sides that are cut off."""

    left: float = 0
    top: float = 0
    right: float = 0
    bottom: float = 0


COARSE = 8  # side at which candidates are sought
ROWS = 256  # images that are compared with all others at a time, which limits the memory
UNCROPPED = CropShares()
# Crops that are tried for candidates. What lies between them is near enough.
CROPS = [
    UNCROPPED,
    CropShares(0.05, 0.05, 0.05, 0.05),
    CropShares(left=0.1),
    CropShares(top=0.1),
    CropShares(right=0.1),
    CropShares(bottom=0.1),
    CropShares(left=0.08, top=0.08),
    CropShares(top=0.08, right=0.08),
    CropShares(left=0.08, bottom=0.08),
    CropShares(right=0.08, bottom=0.08),
]
VIEWS = list(product(CROPS, (False, True)))  # crop, mirrored
# Candidates per image: a thousand images with the same background are all alike at 8 x 8.
MAX_CANDIDATES = 8
MAX_CROP, MIN_CROP = 0.15, -0.02  # share of a side
# Candidates differ by at most this share of their contrast (as variances), plus so many levels.
ALIKE, NOISE = 0.3, 3.0
# Side at which candidates are aligned, a third of the thumbnails': shifts are then fractions of a
# pixel.
FINE = 16
FIRST_STEP, LAST_STEP = 0.04, 0.005  # of an edge during alignment, as a share of the side
CELL = 4  # pixels per side of the squares in which two aligned images are compared
SAME_EDGE = 0.01  # a crop below this share is none
# A crop must reduce the distance by this factor; otherwise it only fits another difference.
EXPLAINED = 1.4
# How much two images may differ in the worst cell and on average: levels of 255, for compression
# and scaling, plus a share of the contrast if they were cropped, since they are then aligned to a
# fraction of a pixel only. Of 1,000 planted copies the uncropped ones were within 3 levels in the
# worst cell, the cropped ones within 4 and 0.06 of the contrast.
LEVELS, WORST_CROPPED, MEAN_CROPPED = 4.0, 0.08, 0.02


class Pair(NamedTuple):
    """Two images, by index, of which the second is nearly the first: mirrored, or showing less or
    more of it."""

    first: int
    second: int
    mirrored: bool
    cropped: bool


class _Candidate(NamedTuple):
    """The inner image looks at 8 x 8 much like this crop of the outer one."""

    inner: int
    outer: int
    mirrored: bool
    crop: CropShares


def near_duplicates(thumbnails: np.ndarray) -> list[Pair]:
    """The pairs of near-duplicates among the thumbnails uint8 [N, S, S, 3], each once.

    Time grows with the square of N, memory with N. Of an image with many copies only
    MAX_CANDIDATES are paired with it.
    """
    if len(thumbnails) < 2:
        return []
    pairs: dict[tuple[int, int], Pair] = {}
    for inner, outer, mirrored, crop in _candidates(thumbnails):
        key = (min(inner, outer), max(inner, outer))
        if key not in pairs:
            aligned = align(thumbnails[inner], thumbnails[outer], mirrored, crop)
            if aligned is not None:
                pairs[key] = Pair(*key, mirrored, _is_cropped(aligned))
    return sorted(pairs.values())


def _is_cropped(crop: CropShares) -> bool:
    return max(map(abs, crop)) > SAME_EDGE


def _candidates(thumbnails: np.ndarray) -> Iterator[_Candidate]:
    """The MAX_CANDIDATES nearest images of every one, with the crop that brings them nearest."""
    coarse = _shrink(thumbnails, UNCROPPED, COARSE).reshape(len(thumbnails), 3 * COARSE**2)
    mean = coarse.mean()
    coarse -= mean  # keeps the squares small, and with them the rounding errors of float32
    contrast = coarse.reshape(len(thumbnails), -1, 3).var(1).mean(1)
    num_nearest = min(MAX_CANDIDATES, len(thumbnails))
    for start in range(0, len(thumbnails), ROWS):
        rows = thumbnails[start : start + ROWS]
        distances, views = _nearest_views(rows, coarse, mean)
        diagonal = np.arange(len(rows))
        distances[diagonal, start + diagonal] = np.inf  # nothing is its own duplicate
        limits = ALIKE * np.minimum(contrast[start : start + ROWS, None], contrast) + NOISE**2
        distances /= limits
        nearest = np.argpartition(distances, num_nearest - 1, axis=1)[:, :num_nearest]
        for row, columns in enumerate(nearest.tolist()):
            for column in columns:
                if distances[row, column] <= 1:
                    crop, mirrored = VIEWS[views[row, column]]
                    yield _Candidate(column, start + row, mirrored, crop)


def _nearest_views(
    rows: np.ndarray, coarse: np.ndarray, mean: np.floating
) -> tuple[np.ndarray, np.ndarray]:
    """The mean squared distance of each of the R thumbnails, in its nearest view, from all N images
    at 8 x 8, float32 [R, N]; and the index of that view, uint8 [R, N]."""
    width = coarse.shape[1]
    squares = (coarse**2).sum(1)
    nearest = np.full((len(rows), len(coarse)), np.inf, np.float32)
    views = np.zeros(nearest.shape, np.uint8)
    for index, (crop, mirrored) in enumerate(VIEWS):
        source = rows[:, :, ::-1] if mirrored else rows
        seen = _shrink(source, crop, COARSE).reshape(len(rows), width) - mean
        distances = ((seen**2).sum(1)[:, None] + squares - 2 * seen @ coarse.T) / width
        is_nearer = distances < nearest
        nearest[is_nearer] = distances[is_nearer]
        views[is_nearer] = index
    return nearest, views


def _shrink(thumbnails: np.ndarray, crop: CropShares, side: int) -> np.ndarray:
    """This crop of all thumbnails [N, S, S, 3] as float32 [N, side, side, 3], by area averages:
    products with two small matrices."""
    count, height, width, _ = thumbnails.shape
    average_x = _averages(width, crop.left, 1 - crop.right, side)
    average_y = _averages(height, crop.top, 1 - crop.bottom, side)
    shrunk = np.empty((count, side, side, 3), np.float32)
    for start in range(0, count, ROWS):
        part = thumbnails[start : start + ROWS].astype(np.float32)
        rows = average_y @ part.reshape(len(part), height, width * 3)
        shrunk[start : start + ROWS] = average_x @ rows.reshape(len(part), side, width, 3)
    return shrunk


@lru_cache(4096)
def _averages(pixels: int, start: float, end: float, side: int) -> np.ndarray:
    """A matrix float32 [side, pixels]: each row averages the pixels in one of side equal parts of
    start ... end.

    Start and end are shares of the whole; beyond 0 and 1 the outermost pixel is repeated.
    """
    edges = (start + (end - start) * np.arange(side + 1) / side) * pixels
    place = np.arange(pixels)
    weights = np.minimum(edges[1:, None], place + 1) - np.maximum(edges[:-1, None], place)
    weights = weights.clip(0)
    weights[:, 0] += (np.minimum(edges[1:], 0) - np.minimum(edges[:-1], 0)).clip(0)
    weights[:, -1] += (np.maximum(edges[1:], pixels) - np.maximum(edges[:-1], pixels)).clip(0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def align(
    inner: np.ndarray, outer: np.ndarray, mirrored: bool, crop: CropShares
) -> CropShares | None:
    """The crop of the outer image (mirrored first) that the inner one shows, or None if they are
    not alike.

    Both are uint8 [S, S, 3]. Starting from the given crop, the edges are moved one after the other,
    in steps that are halved, as long as the images get nearer.
    """
    target = _shrink(inner[None], UNCROPPED, FINE)[0]
    whole = (outer[:, ::-1] if mirrored else outer)[None]

    def distance(crop: CropShares) -> float:
        return float(((_shrink(whole, crop, FINE)[0] - target) ** 2).mean())

    best, step = distance(crop), FIRST_STEP
    while step >= LAST_STEP:
        start = crop
        for edge, move in product(CropShares._fields, (-step, step)):
            share = getattr(crop, edge) + move
            if not MIN_CROP <= share <= MAX_CROP:
                continue
            moved = crop._replace(**{edge: share})
            value = distance(moved)
            if value < best:
                best, crop = value, moved
        if crop == start:
            step /= 2
    cropped = _is_cropped(crop) and best * EXPLAINED < distance(UNCROPPED)
    return crop if _is_alike(_shrink(whole, crop, FINE)[0], target, cropped) else None


def _is_alike(one: np.ndarray, other: np.ndarray, cropped: bool) -> bool:
    """Whether two float images [S, S, 3] differ nowhere by more than compression, scaling and
    cropping explain."""
    num_cells = len(one) // CELL
    difference = np.abs(one - other).reshape(num_cells, CELL, num_cells, CELL, 3)
    cells = difference.mean((1, 3, 4))
    contrast = min(one.std((0, 1)).mean(), other.std((0, 1)).mean()) if cropped else 0.0
    worst, mean = cells.max(), cells.mean()
    return bool(
        worst <= WORST_CROPPED * contrast + LEVELS and mean <= MEAN_CROPPED * contrast + LEVELS
    )

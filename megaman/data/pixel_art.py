"""Is an image pixel art? And how large are its cells, if it was enlarged already?

The rule is measured by benchmarks/pixel_art.py on photographs, drawings and sprites.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

MAX_GRID_CELL = 4  # pixels; JPEG's own blocks look like larger cells
FLAT, EDGE = 4, 40  # differences of neighbors, of 255 levels
MIN_PART = 0.2  # of an edge's height on each side of a blend
MIN_PIXELS = 3  # JPEG's noise makes rarer hues
TINY = 32 * 32  # pixels
# A logistic regression on the features of `measure`.
WEIGHTS = {
    "bias": -7.44,
    "colors": -1.04,
    "hues": 1.6,
    "changes": 2.29,
    "blends": -2.24,
    "ramps": -2.55,
    "grid": -3.83,
    "tiny": 13.8,
}


def is_pixel_art(image: Image.Image) -> bool:
    """Whether an image in RGB or RGBA is pixel art: at its own size, enlarged with nearest
    neighbor, or saved as JPEG.

    What tells it from photographs and smooth drawings, even as JPEG: if brightness rises between
    two pixels, it hardly ever rises to the next as well, as it does where edges are blends.
    Besides, pixel art has few colors, but many hues for that, and small flat areas, or it shows a
    grid of cells, or it is tiny.
    """
    pixels = _pixels(image)
    if (pixels == pixels[0, 0]).all():
        return False
    features = measure(pixels)
    return sum(weight * features[name] for name, weight in WEIGHTS.items()) > 0


def cell_side(image: Image.Image) -> int:
    """The side in pixels of the largest cells, each of one color, that an image in RGB or RGBA is
    made of: 3 if it was enlarged three times with nearest neighbor, 1 if it was not or if all
    pixels are alike."""
    pixels = _pixels(image)
    changes = np.concatenate([_changes(pixels), _changes(pixels.swapaxes(0, 1))])
    return math.gcd(*pixels.shape[:2], *changes.tolist()) if changes.size else 1


def _pixels(image: Image.Image) -> np.ndarray:
    """Colors times opacity, and opacity: int16 [H, W, 4]."""
    values = np.asarray(image.convert("RGBA")).astype(np.int16)
    opacity = values[..., 3:]
    if (opacity == 255).all():
        return values
    colors = values[..., :3].astype(np.int32) * opacity // 255  # products overflow int16
    return np.concatenate([colors.astype(np.int16), opacity], axis=-1)


def _luma(pixels: np.ndarray) -> np.ndarray:
    """Brightness and opacity, int16 [H, W, 2]: what JPEG keeps at full resolution."""
    red, green, blue, opacity = np.moveaxis(pixels.astype(np.int32), -1, 0)
    brightness = (299 * red + 587 * green + 114 * blue) // 1000
    return np.stack([brightness, opacity], axis=-1).astype(np.int16)


def _changes(pixels: np.ndarray) -> np.ndarray:
    """The positions along the first axis at which anything changes."""
    return np.flatnonzero((np.diff(pixels, axis=0) != 0).any(axis=(1, 2))) + 1


def _differences(pixels: np.ndarray) -> np.ndarray:
    """The larger difference of the two channels between neighbors along the first axis."""
    return _larger(np.abs(np.diff(pixels, axis=0)))


def _larger(values: np.ndarray) -> np.ndarray:
    """The maximum over a last axis of two; NumPy's own is slow over so few."""
    return np.maximum(values[..., 0], values[..., 1])


def measure(pixels: np.ndarray) -> dict[str, float]:
    """What the rule looks at, of pixels [H, W, 4], as logarithms: how many colors there are, also
    at 16 levels a channel (hues); the shares of neighbors that differ, of edges with a pixel
    between both colors, and of ramps; the ratio of the best grid; and how many times fewer pixels
    there are than TINY.
    """
    luma = _luma(pixels)
    both = (luma, luma.swapaxes(0, 1))
    steps = [_differences(each) for each in both]
    edges, blends = np.sum([_count_blends(each) for each in both], axis=0)
    ramps, total = np.sum([_sum_ramps(each) for each in both], axis=0)
    differing = np.concatenate([each.ravel() for each in steps]) > FLAT
    num_colors, num_hues = _count_colors(pixels)
    return {
        "bias": 1.0,
        "colors": math.log(num_colors),
        "hues": math.log(1 + num_hues),
        "changes": math.log(0.02 + float(differing.mean())),
        "blends": math.log(0.01 + float((blends + 1) / (edges + 10))),  # few edges say little
        "ramps": math.log(0.01 + float(ramps / max(1, total))),
        "grid": math.log(max(0.02, _grid_ratio(steps))),
        "tiny": max(0.0, math.log(TINY / (luma.shape[0] * luma.shape[1]))),
    }


def _grid_ratio(steps: list[np.ndarray]) -> float:
    """The mean difference of neighbors within cells, divided by that across the cells' borders, of
    the cells that fit best; 1 without a grid."""
    profiles = [each.mean(axis=1) for each in steps]
    everything = np.concatenate(profiles)
    ratios = [1.0]
    for side in range(2, min(MAX_GRID_CELL, (min(map(len, profiles)) + 1) // 8) + 1):
        borders = np.concatenate([profile[side - 1 :: side] for profile in profiles])
        within = (everything.sum() - borders.sum()) / (len(everything) - len(borders))
        ratios.append(float(within / (borders.mean() + 1e-6)))
    return min(ratios)


def _count_colors(pixels: np.ndarray) -> tuple[int, int]:
    """How many colors there are, opacity included, and how many hues have at least MIN_PIXELS."""
    packed = pixels.astype(np.uint8).view(np.uint32)  # sorted in a fraction of the time of rows
    colors, counts = np.unique(packed, return_counts=True)
    levels = (colors[:, None].view(np.uint8).astype(np.int64) + 8) // 16  # 0 to 16
    hues = levels @ np.array([17**3, 17**2, 17, 1])
    return len(colors), int((np.bincount(hues, weights=counts) >= MIN_PIXELS).sum())


def _sum_ramps(luma: np.ndarray) -> tuple[float, float]:
    """The products of neighboring steps in the same direction along the first axis, summed, and the
    squares of all steps."""
    steps = np.diff(luma.astype(np.float32), axis=0)
    return float(np.maximum(steps[1:] * steps[:-1], 0).sum()), float(np.square(steps).sum())


def _count_blends(luma: np.ndarray) -> tuple[int, int]:
    """Of three pixels along the first axis, how often the outer ones differ much, and how often the
    one in the middle is between them then."""
    before, middle, after = luma[:-2], luma[1:-1], luma[2:]
    is_edge = _larger(np.abs(after - before)) >= EDGE
    first, second = (middle - before)[is_edge], (after - middle)[is_edge]
    change = first + second
    channel = np.abs(change).argmax(axis=-1)[:, None]
    first, second, change = (
        np.take_along_axis(values, channel, axis=-1) for values in (first, second, change)
    )
    sign, least = np.sign(change), MIN_PART * np.abs(change)
    rises = (first * sign >= least) & (second * sign >= least)
    return int(is_edge.sum()), int(rises.sum())

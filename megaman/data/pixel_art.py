"""Is an image pixel art? And how large are its cells, if it was enlarged already?

The rule is measured by benchmarks/pixel_art.py on photographs, drawings and sprites.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

FEW_COLORS = 64  # no photograph and hardly a smooth drawing has so few
MAX_LOSSY_CELL = 4  # pixels; JPEG's own blocks look like larger cells
MAX_GRID_RATIO = 0.5
FLAT, EDGE = 4, 40  # differences of neighbors, of 255 levels
MIN_PART = 0.2  # of an edge's height on each side of a blend
SMALL = 64 * 64  # pixels
# Logistic regressions on the features of `measure`.
FEW_WEIGHTS = {"bias": 51.1, "flat": -25.9, "blends": -17.7, "colors": -1.87, "size": -2.13}
MANY_WEIGHTS = {
    "bias": 16.6,
    "blends": -27.8,
    "colors": -1.24,
    "hues": 2.13,
    "small": 4.58,
    "size": -1.76,
}


def is_pixel_art(image: Image.Image) -> bool:
    """Whether an image in RGB or RGBA is pixel art: at its own size, enlarged with nearest
    neighbor, or saved as JPEG.

    With few colors, pixel art differs from smooth drawings in that its edges have no blends of the
    colors on both sides. With many, as JPEG leaves them, it shows a grid of cells, or it is small,
    colorful and has few blends.
    """
    pixels = _pixels(image)
    side = _cell_side(pixels)
    if not side:
        return False
    if _count_colors(pixels) <= FEW_COLORS:
        return _score(pixels[::side, ::side], FEW_WEIGHTS) > 0
    return _grid_ratio(_luma(pixels)) < MAX_GRID_RATIO or _score(pixels, MANY_WEIGHTS) > 0


def cell_side(image: Image.Image) -> int:
    """The side in pixels of the largest cells, each of one color, that an image in RGB or RGBA is
    made of: 3 if it was enlarged three times with nearest neighbor, 1 if it was not."""
    return _cell_side(_pixels(image)) or 1


def _cell_side(pixels: np.ndarray) -> int:
    """The side in pixels of the largest cells, 0 if all pixels are alike."""
    changes = np.concatenate([_changes(pixels), _changes(pixels.swapaxes(0, 1))])
    return math.gcd(*pixels.shape[:2], *changes.tolist()) if changes.size else 0


def _pixels(image: Image.Image) -> np.ndarray:
    """Colors times opacity, and opacity: int16 [H, W, 4]."""
    values = np.asarray(image.convert("RGBA")).astype(np.int16)
    opacity = values[..., 3:]
    colors = values[..., :3].astype(np.int32) * opacity // 255  # products overflow int16
    return np.concatenate([colors.astype(np.int16), opacity], axis=-1)


def _luma(pixels: np.ndarray) -> np.ndarray:
    """Brightness and opacity, int16 [H, W, 2]: what JPEG keeps at full resolution."""
    brightness = pixels[..., :3].astype(np.int32) @ np.array([299, 587, 114]) // 1000
    return np.stack([brightness.astype(np.int16), pixels[..., 3]], axis=-1)


def _changes(pixels: np.ndarray) -> np.ndarray:
    """The positions along the first axis at which anything changes."""
    return np.flatnonzero((np.diff(pixels, axis=0) != 0).any(axis=(1, 2))) + 1


def _differences(pixels: np.ndarray) -> np.ndarray:
    """The largest difference of any channel between neighbors along the first axis."""
    return np.abs(np.diff(pixels, axis=0)).max(axis=-1)


def _grid_ratio(luma: np.ndarray) -> float:
    """The mean difference of neighbors within cells, divided by that across the cells' borders, of
    the cells that fit best; 1 without a grid."""
    profiles = [_differences(each).mean(axis=1) for each in (luma, luma.swapaxes(0, 1))]
    everything = np.concatenate(profiles)
    ratios = [1.0]
    for side in range(2, min(MAX_LOSSY_CELL, min(luma.shape[:2]) // 8) + 1):
        borders = np.concatenate([profile[side - 1 :: side] for profile in profiles])
        within = (everything.sum() - borders.sum()) / (len(everything) - len(borders))
        ratios.append(float(within / (borders.mean() + 1e-6)))
    return min(ratios)


def _score(pixels: np.ndarray, weights: dict[str, float]) -> float:
    """A logistic regression's log odds that an image is pixel art."""
    features = measure(pixels)
    return sum(weight * features[name] for name, weight in weights.items())


def measure(pixels: np.ndarray) -> dict[str, float]:
    """What the rule looks at, of pixels [H, W, 4] at one pixel a cell.

    flat is the share of neighbors that are alike, blends that of edges with a pixel between both
    colors. Logarithms are how many colors there are, also at 16 levels a channel (hues), how many
    pixels (size), and how many times fewer than SMALL (small).
    """
    luma = _luma(pixels)
    both = (luma, luma.swapaxes(0, 1))
    count = pixels.shape[0] * pixels.shape[1]
    steps = np.concatenate([_differences(each).ravel() for each in both])
    edges, blends = np.sum([_count_blends(each) for each in both], axis=0)
    return {
        "bias": 1.0,
        "flat": float((steps <= FLAT).mean()),
        "blends": float((blends + 1) / (edges + 10)),  # few edges say little
        "colors": math.log(_count_colors(pixels)),
        "hues": math.log(_count_colors((pixels + 8) // 16)),
        "size": math.log(count),
        "small": max(0.0, math.log(SMALL / count)),
    }


def _count_colors(pixels: np.ndarray) -> int:
    """How many distinct colors there are, opacity included."""
    return len(np.unique(pixels.astype(np.int64) @ (1 << np.array([24, 16, 8, 0]))))


def _count_blends(luma: np.ndarray) -> tuple[int, int]:
    """Of three pixels along the first axis, how often the outer ones differ much, and how often the
    one in the middle is between them then."""
    before, middle, after = luma[:-2], luma[1:-1], luma[2:]
    change = after - before
    channel = np.abs(change).argmax(axis=-1)[..., None]

    def pick(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, channel, axis=-1)[..., 0]

    change, sign = np.abs(pick(change)), np.sign(pick(change))
    is_edge = change >= EDGE
    rises = pick(middle - before) * sign >= MIN_PART * change
    rises &= pick(after - middle) * sign >= MIN_PART * change
    return int(is_edge.sum()), int((is_edge & rises).sum())

"""Generated images as clean pixel art: a grid of cells, each of one color of a palette."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

# From linear sRGB to the cones' responses, and from their cube roots to Oklab.
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def snap(image: Image.Image, cells: int, palette: Sequence[str]) -> Image.Image:
    """The image as a grid with this number of cells on its shorter side, enlarged by a whole
    factor: each cell is the median of its pixels, and then the nearest color of the palette in
    Oklab, if there is one.

    The result is up to one cell smaller than the image where its sides are no multiples of it.
    """
    shorter = min(image.size)
    size = _round(image.width * cells / shorter), _round(image.height * cells / shorter)
    colors = _cell_medians(image, size)
    if palette:
        colors = nearest_colors(colors, palette)
    factor = max(1, shorter // cells)
    small = Image.fromarray(colors.astype(np.uint8))
    enlarged = size[0] * factor, size[1] * factor
    return small.resize(enlarged, Image.Resampling.NEAREST)


def _round(value: float) -> int:
    return max(1, round(value))


def _cell_medians(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The median color of each cell, [rows, columns, 3], of an image in so many columns and
    rows."""
    columns, rows = size
    side = -(-min(image.size) // min(size))  # rounded up, so that no pixel is skipped
    whole = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.NEAREST)
    cells = np.asarray(whole).reshape(rows, side, columns, side, 3)
    return np.median(cells, axis=(1, 3))


def nearest_colors(colors: np.ndarray, palette: Iterable[str]) -> np.ndarray:
    """For each color [..., 3] from 0 to 255, the one of the palette that looks most alike."""
    choices = np.array([list(bytes.fromhex(color)) for color in palette], dtype=float)
    flat = to_oklab(colors.reshape(-1, 3))
    distances = ((flat[:, None] - to_oklab(choices)[None]) ** 2).sum(axis=-1)
    return choices[distances.argmin(axis=1)].reshape(colors.shape)


def to_oklab(colors: np.ndarray) -> np.ndarray:
    """sRGB colors [N, 3] from 0 to 255 in Oklab, in which distances are as large as they look (B.
    Ottosson, "A perceptual color space for image processing", 2020)."""
    values = colors / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_CONES.T) @ TO_OKLAB.T

"""Pixel art of nothing in particular: soups of small shaded parts, for the VAE alone.

An autoencoder that has only seen a few kinds of sprites learns those sprites. These pictures hold
what pixel art is made of (flat cells, one-cell lines, shading in ramps, dark outlines, stripes,
checks, glints) in every color and order, so that it can carry a character that nobody has drawn
yet. They have no captions: the UNet never sees them.
"""

from __future__ import annotations

import colorsys

import numpy as np
from backgrounds import CELLS, NAMES, draw_background

ROWS, COLUMNS = np.mgrid[:CELLS, :CELLS]


def draw_mosaic(rng: np.random.Generator) -> np.ndarray:
    """Draw one mosaic: uint8 [64, 64, 3], cells of 2 x 2 pixels."""
    cells = draw_background(str(rng.choice(NAMES)), rng)[::2, ::2].copy()
    first = (
        rng.random()
    )  # the hues of a character clash: that is what the latents find hardest to carry
    ramps = [
        _ramp(rng, first + rng.choice([0, 0.33, 0.5, 0.66, rng.random()]))
        for _ in range(rng.integers(3, 7))
    ]
    outline = rng.integers(0, 48, 3)
    parts = int(rng.integers(6, 34))
    for _ in range(parts):
        mask = _part(rng, largest=14 if parts < 14 else 8)
        if rng.random() < 0.6:
            cells[_grown(mask)] = outline
        _shade(cells, mask, ramps[rng.integers(len(ramps))], rng)
        if rng.random() < 0.6:  # a panel of another color in it
            inlay = mask & _near(mask, rng)
            _shade(cells, inlay, ramps[rng.integers(len(ramps))], rng)
    if rng.random() < 0.3:  # many characters are symmetrical
        cells[:, CELLS // 2 :] = cells[:, CELLS // 2 - 1 :: -1]
    return cells.repeat(2, axis=0).repeat(2, axis=1)


def _near(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small box around one of the mask's cells."""
    rows, columns = ROWS[mask], COLUMNS[mask]
    if not len(rows):
        return mask
    spot, across, down = rng.integers(len(rows)), rng.integers(1, 4), rng.integers(1, 4)
    return (np.abs(COLUMNS - columns[spot]) < across) & (np.abs(ROWS - rows[spot]) < down)


def _ramp(rng: np.random.Generator, hue: float) -> np.ndarray:
    """Four shades of one color from light to dark, the hue turning a little on the way: uint8 [4,
    3]."""
    saturation = rng.choice([rng.uniform(0, 0.25), rng.uniform(0.5, 1)], p=[0.25, 0.75])
    value, turn = rng.uniform(0.45, 1), rng.uniform(-0.05, 0.05)
    steps = [(1.25, 0.6), (1.0, 1.0), (0.72, 1.05), (0.48, 1.1)]
    shades = [
        colorsys.hsv_to_rgb((hue + turn * i) % 1, min(saturation * more, 1), min(value * light, 1))
        for i, (light, more) in enumerate(steps)
    ]
    return (np.array(shades) * 255).astype(np.uint8)


def _part(rng: np.random.Generator, largest: int) -> np.ndarray:
    """Mask of a box, an ellipse, a thick line or a ragged blob."""
    column, row = rng.uniform(1, CELLS - 1, 2)
    across, down = rng.uniform(1, largest / 2, 2)
    shape = rng.integers(4)
    if shape == 0:
        return (np.abs(COLUMNS - column) < across) & (np.abs(ROWS - row) < down)
    if shape == 1:
        return ((COLUMNS - column) / across) ** 2 + ((ROWS - row) / down) ** 2 <= 1
    if shape == 2:
        along = rng.uniform(-largest, largest, 2)
        offset = np.stack([COLUMNS - column, ROWS - row], -1)
        share = np.clip(offset @ along / max(along @ along, 1e-6), 0, 1)
        return np.linalg.norm(offset - share[..., None] * along, axis=-1) <= rng.uniform(0.5, 2.2)
    near = (np.abs(COLUMNS - column) < across + 1) & (np.abs(ROWS - row) < down + 1)
    return near & (rng.random((CELLS, CELLS)) < 0.6)


def _grown(mask: np.ndarray) -> np.ndarray:
    frame = np.pad(mask, 1)
    return mask | frame[:-2, 1:-1] | frame[2:, 1:-1] | frame[1:-1, :-2] | frame[1:-1, 2:]


def _shade(cells: np.ndarray, mask: np.ndarray, ramp: np.ndarray, rng: np.random.Generator) -> None:
    """Fill a part with its ramp: lit from a side, striped, checked or speckled, sometimes with a
    glint."""
    style = rng.integers(5)
    rows, columns = ROWS[mask], COLUMNS[mask]
    if not len(rows):
        return
    place = (rows - rows.min()) / max(np.ptp(rows), 1) + (columns - columns.min()) / max(
        np.ptp(columns), 1
    )
    if style <= 1:
        levels = np.digitize(place, np.sort(rng.uniform(0, 2, 3)))
    elif style == 2:
        levels = (rows if rng.random() < 0.5 else columns) % 2 + rng.integers(0, 3)
    elif style == 3:
        levels = (rows + columns) % 2 + rng.integers(0, 3)
    else:
        levels = np.where(
            rng.random(len(rows)) < 0.25, rng.integers(0, 4, len(rows)), rng.integers(4)
        )
    cells[mask] = ramp[levels]
    if rng.random() < 0.4:
        spot = rng.integers(len(rows))
        cells[rows[spot], columns[spot] : columns[spot] + rng.integers(1, 4)] = rng.integers(
            200, 256, 3
        )

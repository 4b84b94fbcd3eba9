"""A comparison as one image: LoRAs and strengths across, prompts and seeds down, with labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megaman.files import replacing

# Pixels: an image's longer side, the gap between images, and the labels on the left.
CELL, GAP, MARGIN = 256, 8, 220
MAX_SIDE = 16384  # pixels of the whole; a longer comparison gets smaller images
FONT_SIZE = 14


def save_grid(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Path]]]
) -> None:
    """Write a PNG of image files in rows, each with a label and one file a column.

    All images have the same size.
    """
    width, height = _cell_size(rows[0][1][0], max(len(columns), len(rows)))
    font = ImageFont.load_default(FONT_SIZE)
    top = FONT_SIZE * 3
    size = (MARGIN + len(columns) * (width + GAP), top + len(rows) * (height + GAP))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(columns):
        x = MARGIN + column * (width + GAP)
        _write(draw, label, (x, GAP), (width, top - GAP), font)
    for row, (label, files) in enumerate(rows):
        y = top + row * (height + GAP)
        _write(draw, label, (GAP, y), (MARGIN - 2 * GAP, height), font)
        for column, file in enumerate(files):
            x = MARGIN + column * (width + GAP)
            grid.paste(_load(file, (width, height)), (x, y))
    with replacing(path) as aside:
        grid.save(aside, format="PNG")


def _load(file: Path, size: tuple[int, int]) -> Image.Image:
    with Image.open(file) as image:
        enlarges = image.width < size[0]
        method = Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
        return image.convert("RGB").resize(size, method)


def _cell_size(file: Path, count: int) -> tuple[int, int]:
    """Width and height of each of count cells; tiny images are enlarged by a whole factor."""
    with Image.open(file) as image:
        longer = max(image.size)
        limit = max(16, min(CELL, (MAX_SIDE - MARGIN) // count - GAP))
        factor = limit // longer if longer <= limit else limit / longer
        return max(1, round(image.width * factor)), max(1, round(image.height * factor))


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    position: tuple[int, int],
    size: tuple[int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Write the part of a text that fits into a box; Pillow's own font has only Latin letters."""
    width, height = size
    latin = text.encode("latin-1", "ignore").decode("latin-1")
    columns = max(4, width // (FONT_SIZE // 2))
    lines = list(chain.from_iterable(textwrap.wrap(line, columns) for line in latin.splitlines()))
    fitting = lines[: max(1, height // (FONT_SIZE + 4))]
    draw.multiline_text(position, "\n".join(fitting), fill="black", font=font)

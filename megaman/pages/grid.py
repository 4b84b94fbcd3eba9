"""A comparison as one picture: LoRAs and strengths across, prompts and seeds down, with labels on
both axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megaman.files import replacing

CELL, GAP, MARGIN = (
    256,
    8,
    220,
)  # pixels: a picture's longer side, between two, for the labels on the left
LONGEST_SIDE = 16384  # pixels of the whole; a longer comparison gets smaller pictures
FONT_SIZE = 14


def save_grid(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Path]]]
) -> None:
    """Write a PNG with the pictures in the files of each row, one a column, all of one size."""
    width, height = _cell(rows[0][1][0], max(len(columns), len(rows)))
    font = ImageFont.load_default(FONT_SIZE)
    head = FONT_SIZE * 3
    whole = Image.new(
        "RGB", (MARGIN + len(columns) * (width + GAP), head + len(rows) * (height + GAP)), "white"
    )
    draw = ImageDraw.Draw(whole)
    for place, column in enumerate(columns):
        _write(draw, (MARGIN + place * (width + GAP), GAP), column, width, head - GAP, font)
    for line, (label, files) in enumerate(rows):
        top = head + line * (height + GAP)
        _write(draw, (GAP, top), label, MARGIN - 2 * GAP, height, font)
        for place, file in enumerate(files):
            with Image.open(file) as picture:
                how = (
                    Image.Resampling.NEAREST if picture.width < width else Image.Resampling.LANCZOS
                )
                scaled = picture.convert("RGB").resize((width, height), how)
            whole.paste(scaled, (MARGIN + place * (width + GAP), top))
    with replacing(path) as aside:
        whole.save(aside, format="PNG")


def _cell(file: Path, most: int) -> tuple[int, int]:
    """Width and height of a cell: tiny pictures enlarged by whole steps, large ones made
    smaller."""
    with Image.open(file) as picture:
        longer = max(picture.size)
        room = max(16, min(CELL, (LONGEST_SIDE - MARGIN) // most - GAP))
        factor = room // longer if longer <= room else room / longer
        return max(1, round(picture.width * factor)), max(1, round(picture.height * factor))


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int, height: int, font
) -> None:
    """Write a text into a box, what does not fit left out. Pillow's own font has Latin letters
    alone."""
    latin = text.encode("latin-1", "ignore").decode("latin-1")
    lines = [
        part
        for line in latin.splitlines()
        for part in textwrap.wrap(line, max(4, width // (FONT_SIZE // 2)))
    ]
    draw.multiline_text(
        at, "\n".join(lines[: max(1, height // (FONT_SIZE + 4))]), fill="black", font=font
    )

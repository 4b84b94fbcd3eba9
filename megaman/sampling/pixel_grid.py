"""The grid and the palette of --pixel_art. Nothing here loads numpy."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megaman.data.images import BadImageError, open_image
from megaman.data.palette import MAX_COLORS, colors_of
from megaman.errors import UserError
from megaman.lora.notes import PALETTE, read_header

HEX = re.compile(r"#?([0-9a-fA-F]{6})")
GPL_COLOR = re.compile(r"\s*(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})(\s.*)?")
MAX_BYTES = 10**6  # of a palette as text
REMEDY = "Name an image of at most 256 colors, a .hex list or a .gpl palette"


@dataclass(frozen=True)
class PixelGrid:
    """How images are made pixel art: cells on their shorter side, and colors as rrggbb."""

    cells: int
    palette: tuple[str, ...]

    @classmethod
    def parse(cls, value: str, loras: Iterable[Path]) -> PixelGrid:
        """The grid of --pixel_art, N or N,PALETTE; without a file, the palette is that of the
        LoRAs, none if they have none. Raises UserError as `read_palette`."""
        cells, _, file = value.partition(",")
        colors = read_palette(Path(file)) if file else lora_palette(loras)
        return cls(int(cells), tuple(colors))

    def check(self, width: int, height: int) -> None:
        """Raise UserError if an image of this size in pixels has fewer pixels than cells."""
        if self.cells > min(width, height):
            raise UserError(
                f"--pixel_art {self.cells} is more than the {min(width, height)} pixels of an "
                f"image of {width}x{height}",
                "Choose a lower number",
            )

    def summary(self) -> str:
        """The grid as a line to print."""
        colors = f"{len(self.palette)} colors" if self.palette else "no palette: colors stay"
        return f"{self.cells} cells on the shorter side, {colors}"


def lora_palette(loras: Iterable[Path]) -> list[str]:
    """The palettes that the headers of LoRAs note, at most MAX_COLORS in all."""
    colors: dict[str, None] = {}
    for lora in loras:
        with contextlib.suppress(OSError, UserError):  # which loading it reports better
            words = read_header(lora).get(PALETTE, "").split(",")
            colors |= dict.fromkeys(word for word in words if HEX.fullmatch(word))
    return list(colors)[:MAX_COLORS]


def read_palette(path: Path) -> list[str]:
    """The colors of an image, a list of #rrggbb as Lospec writes it, or a GIMP palette, each as
    rrggbb and once.

    Raises UserError if the file is none of these, or has one color or more than MAX_COLORS.
    """
    name = f"--pixel_art: {path}"
    if not path.is_file():
        raise UserError(f"{name} is not a file", REMEDY)
    if path.suffix.lower() in (".hex", ".gpl", ".txt"):
        colors = _read_list(path, name)
    else:
        try:
            colors = colors_of(open_image(path))
        except BadImageError as error:
            raise UserError(f"{name}: {error}", REMEDY) from None
    if len(colors) < 2:
        raise UserError(f"{name} has {len(colors) or 'no'} color, which makes no image", REMEDY)
    if len(colors) > MAX_COLORS:
        raise UserError(f"{name} has {len(colors):,} colors", REMEDY)
    return colors


def _read_list(path: Path, name: str) -> list[str]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{name} is no list of colors", REMEDY)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{name} cannot be read", REMEDY) from None
    is_gpl = path.suffix.lower() == ".gpl"
    pattern = GPL_COLOR if is_gpl else HEX
    matches = filter(None, map(pattern.fullmatch, map(str.strip, lines)))
    if not is_gpl:
        return list(dict.fromkeys(match[1].lower() for match in matches))
    levels = [[int(level) for level in match.groups()[:3]] for match in matches]
    return list(dict.fromkeys(bytes(each).hex() for each in levels if max(each) < 256))

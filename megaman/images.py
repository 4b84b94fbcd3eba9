"""Pictures on disk: find them, open them upright in RGB, fit them to the training size."""

from __future__ import annotations

import os
import random
import re
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP")  # whatever the name says: no others, such as EPS, are tried
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SMALLEST_SIDE = 16  # anything below holds nothing to learn
# What Pillow raises over damaged pictures and over odd metadata in good ones.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class BadImageError(Exception):
    """A picture that cannot be trained on; the text says why."""


def find_images(folder: Path) -> list[Path]:
    """Every picture in the folder and its subfolders, in natural order (2 before 10), hidden ones left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # not into .git or .thumbnails
        visible = [name for name in names if not name.startswith(".")]
        found += [Path(parent, name) for name in visible if Path(name).suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that compares runs of digits as numbers and the rest without regard to case."""
    pieces = re.findall(r"\d+|\D+", text)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece.casefold()) for piece in pieces] + [(2, 0, text)]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as it will be seen, EXIF orientation applied; reads the header only.

    Raises BadImageError where the file is no picture or is too small.
    """
    with _opened(path) as image:
        width, height = image.size
        if _lies_on_its_side(image):
            width, height = height, width
    if min(width, height) < SMALLEST_SIDE:
        raise BadImageError(f"only {width}x{height} pixels")
    return width, height


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether EXIF gives an orientation from 5 to 8. Only where the header has it: else Pillow decodes a whole PNG."""
    try:
        return "exif" in image.info and image.getexif().get(0x0112) in (5, 6, 7, 8)
    except DAMAGE:
        return False


def open_image(path: Path) -> Image.Image:
    """Decode a picture: upright by EXIF, transparency flattened on white, RGB whatever its mode was.

    Raises BadImageError where it cannot be read.
    """
    with _opened(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on odd EXIF
        try:
            return _flatten(ImageOps.exif_transpose(image))
        except DAMAGE as error:
            raise BadImageError(f"damaged ({error})") from None


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            raise BadImageError("not a picture, whatever its name says") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise BadImageError("too many pixels to be opened safely") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImageError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit grays: Pillow would clip them at 255
        deep = image.convert("F")
        scale = 1 / 257 if deep.getextrema()[1] > 255 else 1
        image = deep.point(lambda value: value * scale + 0).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        canvas.alpha_composite(layer)
        image = canvas
    return image.convert("RGB")


def crop_boxes(width: int, height: int, count: int, rng: random.Random | None) -> list[Box]:
    """Squares as large as the picture allows: the middle one without rng, else up to count drawn from it.

    A square picture has just one.
    """
    side = min(width, height)
    slack_x, slack_y = width - side, height - side
    if rng is None or not (slack_x or slack_y):
        corners = [(slack_x // 2, slack_y // 2)]
    else:
        corners = [(rng.randint(0, slack_x), rng.randint(0, slack_y)) for _ in range(count)]
    return [(left, top, left + side, top + side) for left, top in dict.fromkeys(corners)]


def fit(image: Image.Image, box: Box, size: int) -> Image.Image:
    """Cut out the box and bring it to size x size: area averages to shrink, Lanczos to enlarge, as kohya does."""
    shrinks = box[2] - box[0] >= size
    return image.resize((size, size), Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS, box=box)

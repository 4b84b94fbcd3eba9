"""Pictures on disk: find them, open them upright in RGB, fit them to the training size."""

from __future__ import annotations

import os
import random
import re
import stat
import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "DIB",
    "WEBP",
)  # whatever the name says: no others, such as EPS, are tried
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# Named, so that nobody waits for them, but not read.
OTHER_SUFFIXES = {
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".jfif",
    ".tga",
}
SMALLEST_SIDE = 16  # anything below holds nothing to learn
MOST_ELONGATED = 10  # of anything longer, a square shows less than a tenth
OUR_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM")
OTHER_STARTS = {b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"ftyp": "HEIC or AVIF"}
# What Pillow raises over damaged pictures and over odd metadata in good ones.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class BadImageError(Exception):
    """A picture that cannot be trained on; the text says why."""


def find_images(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Every picture in the folder and its subfolders, in natural order (2 before 10), hidden ones
    left out.

    The second is what a person might have thought to be among them, with the reason why it is not:
    pictures in other formats, linked folders (which could lead in a circle), folders that cannot be
    read.
    """
    found, others = [], {}

    def unreadable(error: OSError) -> None:
        others[Path(error.filename)] = f"cannot be read ({error.strerror})"

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [
            name for name in folders if not name.startswith(".")
        ]  # not into .git or .thumbnails
        linked = [name for name in folders if _is_linked(Path(parent, name))]
        folders[:] = [name for name in folders if name not in linked]
        others |= {
            Path(parent, name): "a link to a folder, which is not followed" for name in linked
        }
        place = Path(parent)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES and not name.startswith("."):
                found.append(place / name)
            elif suffix in OTHER_SUFFIXES and not name.startswith("."):
                others[place / name] = f"{suffix} is not read: save it as PNG or JPG"

    above = len(folder.as_posix()) if folder.parts else 0

    def order(path: Path) -> str:
        return natural_key(path.as_posix()[above:])

    return sorted(found, key=order), {path: others[path] for path in sorted(others, key=order)}


def _is_linked(folder: Path) -> bool:
    """Whether it is a symbolic link or one of Windows' junctions, into which os.walk goes before
    Python 3.12."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    junction = 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT
    return stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == junction


def natural_key(text: str) -> str:
    """Sort key that compares runs of digits as numbers and the rest without regard to case.

    One string: a list of pieces would need four times the memory, which tells with 100,000 names.
    """
    pieces = []
    for piece in re.findall(r"\d+|\D+", text):
        number = str(int(piece)) if piece.isdecimal() else ""
        pieces.append(f"\0{len(number):05d}{number}" if number else f"{piece.casefold()}\1")
    return f"{''.join(pieces)}\U0010ffff{text}"


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as it will be seen, EXIF orientation applied; reads the header only.

    Raises BadImageError where the file is no picture, or one too small or too elongated to be of
    use.
    """
    with _opened(path) as image:
        width, height = image.size
        if _lies_on_its_side(image):
            width, height = height, width
    short, long = sorted((width, height))
    if short < SMALLEST_SIDE:
        raise BadImageError(f"only {width}x{height} pixels")
    if long > MOST_ELONGATED * short:
        raise BadImageError(
            f"{width}x{height} pixels, one side more than {MOST_ELONGATED} times the other: crop it"
        )
    return width, height


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether EXIF gives an orientation from 5 to 8. Only where the header has it: else Pillow
    decodes a whole PNG."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on odd EXIF
            return "exif" in image.info and image.getexif().get(0x0112) in (5, 6, 7, 8)
    except DAMAGE:
        return False


def open_image(path: Path, enough: int | None = None) -> Image.Image:
    """Decode a picture: upright by EXIF, transparency flattened on white, RGB whatever its mode
    was; of an animated one the first frame. Where that many pixels a side are enough, a larger JPEG
    is decoded at a half, a quarter or an eighth of its size, which takes a fraction of the time.

    Raises BadImageError where it cannot be read.
    """
    with _opened(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            if enough:
                image.draft(None, (enough, enough))
            return _flatten(ImageOps.exif_transpose(image))
        except DAMAGE as error:
            raise BadImageError(_reason(error)) from None


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("not a file")  # a pipe would be waited for without end
            if status.st_size == 0:
                raise BadImageError("empty, 0 bytes")
            return Image.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            raise BadImageError(_what_else(path)) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise BadImageError("too many pixels to be opened safely") from None
        except DAMAGE as error:
            raise BadImageError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """What the system says about the file, or else what Pillow says about its content."""
    said = getattr(error, "strerror", None)
    return f"cannot be read ({said})" if said else f"damaged ({error})"


def _what_else(path: Path) -> str:
    """Why Pillow does not know a file as a picture of ours, by its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError as error:
        return _reason(error)
    if kind := OTHER_STARTS.get(start[:4]) or OTHER_STARTS.get(start[4:8]):
        return f"{kind} by its content, which is not read: save it as PNG or JPG"
    return (
        "damaged at its beginning"
        if start.startswith(OUR_STARTS)
        else "not a picture, whatever its name says"
    )


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


def crop_boxes(
    width: int, height: int, count: int, rng: random.Random | None, shape: tuple[int, int] = (1, 1)
) -> list[Box]:
    """Boxes of the shape (width : height) as large as the picture allows: the middle one without
    rng, else up to count drawn from it.

    A picture that has the shape itself has just one.
    """
    across, down = shape
    if width * down >= height * across:
        box_width, box_height = max(1, (height * across + down // 2) // down), height
    else:
        box_width, box_height = width, max(1, (width * down + across // 2) // across)
    slack_x, slack_y = width - box_width, height - box_height
    if rng is None or not (slack_x or slack_y):
        corners = [(slack_x // 2, slack_y // 2)]
    else:
        corners = [(rng.randint(0, slack_x), rng.randint(0, slack_y)) for _ in range(count)]
    return [(left, top, left + box_width, top + box_height) for left, top in dict.fromkeys(corners)]


def fit(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """Cut out the box and bring it to size (width, height): area averages to shrink, Lanczos to
    enlarge, as kohya does."""
    shrinks = box[2] - box[0] >= size[0] and box[3] - box[1] >= size[1]
    return image.resize(
        size, Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS, box=box
    )

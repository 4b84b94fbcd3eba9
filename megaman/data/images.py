"""Images on disk: read their headers, open them upright in RGB, crop and scale them to the
training size."""

from __future__ import annotations

import os
import random
import stat
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from megaman.data.image_files import JPEG_SIGNATURE, OUR_SIGNATURES, other_kind
from megaman.data.png_chunks import SIGNATURE, essential_png

if TYPE_CHECKING:  # torch is imported when an image becomes a tensor: counting must not wait for it
    import torch

# Whatever a file's name says, no other formats, such as EPS, are tried.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF")  # a GIF under another's name
MIN_SIDE = 16  # there is nothing to learn from smaller images
MIN_SPRITE_SIDE = 8  # of pixel art, in which every pixel counts
WHITE = "#ffffff"
MAX_ASPECT_RATIO = 10  # of anything longer, a square shows less than a tenth
# What Pillow raises for damaged images and for odd metadata in good ones.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error)
ORIENTATION = 0x0112  # EXIF tag
# What undoes an orientation (EXIF 2.3); 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEG_SCALES = (1, 2, 4, 8)  # libjpeg decodes at a half, a quarter and an eighth of the size
# Of a JPEG, in multiples of Pillow's limit for other formats: phones write 200 million pixels.
MAX_JPEG_PIXELS = 4
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class BadImageError(Exception):
    """An image that cannot be trained on; the message says why."""


class ImageInfo(NamedTuple):
    """What is known about an image without decoding it: width and height in pixels, upright; the
    size of its file in bytes; a digest of those bytes once they have been read; and the cell of
    pixel art (`pixel_art.find_cell`), 0 for other images."""

    width: int
    height: int
    file_size: int
    digest: bytes | None = None
    cell: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


def image_size(path: Path, min_side: int = MIN_SIDE) -> tuple[int, int]:
    """Width and height with the EXIF orientation applied; reads the header only.

    Raises BadImageError if the file is not an image, or one with a side below min_side or too
    elongated to be of use.
    """
    with _open(path) as image:
        width, height = image.size
        if _orientation(image) in (5, 6, 7, 8):
            width, height = height, width
    short, long = sorted((width, height))
    if short < min_side:
        raise too_small(width, height)
    if long > MAX_ASPECT_RATIO * short:
        raise BadImageError(
            f"{width}x{height} pixels, one side more than {MAX_ASPECT_RATIO} times the other: "
            "crop it"
        )
    return width, height


def too_small(width: int, height: int) -> BadImageError:
    """Why an image of this size is of no use."""
    return BadImageError(f"only {width}x{height} pixels")


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation; 1, which is upright, if it is missing or cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about odd EXIF
            # Not PngImageFile.getexif, which would decode the image to look behind its pixels.
            return Image.Image.getexif(image).get(ORIENTATION, 1)
    except DAMAGE:
        return 1


def open_image(
    path: Path, min_side: int | None = None, side_if_large: int | None = None
) -> Image.Image:
    """Decode an image: upright by EXIF, transparency flattened on white, RGB whatever its mode; the
    first frame of an animation.

    With min_side, a larger JPEG is decoded at a half, a quarter or an eighth of its size, but with
    at least so many pixels per side, which takes a fraction of the time. A JPEG with more pixels
    than are safe to decode is reduced in any case: to side_if_large pixels per side or a little
    more if that is given, else as little as possible.

    Raises BadImageError if it cannot be read.
    """
    return flatten(open_transparent(path, min_side, side_if_large))


def open_transparent(
    path: Path, min_side: int | None = None, side_if_large: int | None = None
) -> Image.Image:
    """As `open_image`, but RGBA if the image has transparency."""
    with _open(path, with_pixels=True) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            _reduce(image, min_side, side_if_large)
            image.load()
            method = UPRIGHT.get(_orientation(image))
            return _to_rgb(image if method is None else image.transpose(method))
        except DAMAGE as error:
            raise BadImageError(_reason(error)) from None


def _reduce(image: Image.Image, min_side: int | None, side_if_large: int | None) -> None:
    """Have a JPEG decoded at a smaller size; other formats stay."""
    width, height = image.size
    safe_scale = next(scale for scale in JPEG_SCALES if width * height <= scale**2 * max_pixels())
    if safe_scale > 1:
        side = min_side or side_if_large or max(width, height)
        image.draft(None, (min(side, width // safe_scale), min(side, height // safe_scale)))
    elif min_side:
        image.draft(None, (min_side, min_side))


def max_pixels() -> int:
    """The number of pixels that are safe to decode."""
    return Image.MAX_IMAGE_PIXELS or 2**26


def _open(path: Path, with_pixels: bool = False) -> Image.Image:
    """Open an image; without with_pixels, of a PNG the header alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("not a file")  # reading a pipe could block forever
            if status.st_size == 0:
                raise BadImageError("empty, 0 bytes")
            with open(path, "rb") as file:
                start = file.read(len(SIGNATURE))
                if start == SIGNATURE:
                    return _open_png(file, with_pixels)
            if start.startswith(JPEG_SIGNATURE):
                return _open_jpeg(path)
            return Image.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            raise BadImageError(_identify(path)) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = f"more than {max_pixels():,} pixels, too many pixels to be opened safely"
            raise BadImageError(f"{limit}: make it smaller, or save it as JPG") from None
        except DAMAGE as error:
            raise BadImageError(_reason(error)) from None


def _open_png(file: BinaryIO, with_pixels: bool) -> Image.Image:
    """A PNG from an open file, by what its pixels need alone; its number of pixels is checked
    before they are read."""
    with_metadata = True
    try:
        header = Image.open(essential_png(file, with_pixels=False), formats=["PNG"])
    except DAMAGE:
        with_metadata = False
        content = essential_png(file, with_pixels=False, with_metadata=False)
        header = Image.open(content, formats=["PNG"])
    if not with_pixels:
        return header
    return Image.open(essential_png(file, with_pixels=True, with_metadata=with_metadata))


def _open_jpeg(path: Path) -> Image.Image:
    """A JPEG, which may have more pixels than Image.open allows, since it can be decoded at an
    eighth of its size."""
    image = JpegImagePlugin.JpegImageFile(path)
    width, height = image.size
    if width * height > MAX_JPEG_PIXELS * max_pixels():
        image.close()
        limit = f"more than {MAX_JPEG_PIXELS * max_pixels():,}"
        raise BadImageError(f"{width}x{height}, too many pixels to be opened safely, {limit}")
    return image


def _reason(error: Exception) -> str:
    """What the system reports about the file, or else what Pillow reports about its content."""
    strerror = getattr(error, "strerror", None)
    return f"cannot be read ({strerror})" if strerror else f"damaged ({error})"


def _identify(path: Path) -> str:
    """Why Pillow does not recognize a file as one of FORMATS, by its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError as error:
        return _reason(error)
    if kind := other_kind(start):
        return f"{kind} by its content, which is not read: save it as PNG or JPG"
    if start.startswith(OUR_SIGNATURES):
        return "damaged at its beginning"
    return "not an image, whatever its name says"


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, or in RGBA if it has transparency."""
    if image.mode.startswith("I"):
        image = _to_8_bit(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def flatten(image: Image.Image, background: str = WHITE) -> Image.Image:
    """An image in RGB or RGBA without transparency, on a background as #rrggbb."""
    if image.mode != "RGBA":
        return image
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grayscale image, however dark, with 8 bits; Pillow would clip it at 255."""
    import numpy as np

    values = np.asarray(image)
    gray = Image.fromarray((values // 257).clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one of 65,536 grays
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def crop_boxes(
    width: int, height: int, count: int, rng: random.Random | None, shape: tuple[int, int] = (1, 1)
) -> list[Box]:
    """The largest boxes of this shape (width : height) in an image: the centered one without rng,
    otherwise up to count random ones.

    An image that has the shape itself has just one.
    """
    shape_width, shape_height = shape
    if width * shape_height >= height * shape_width:
        box_width = max(1, (height * shape_width + shape_height // 2) // shape_height)
        box_height = height
    else:
        box_width = width
        box_height = max(1, (width * shape_height + shape_width // 2) // shape_width)
    slack_x, slack_y = width - box_width, height - box_height
    if rng is None or not (slack_x or slack_y):
        corners = [(slack_x // 2, slack_y // 2)]
    else:
        corners = [(rng.randint(0, slack_x), rng.randint(0, slack_y)) for _ in range(count)]
    return [(left, top, left + box_width, top + box_height) for left, top in dict.fromkeys(corners)]


def crop_and_resize(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]
) -> Image.Image:
    """Cut out the box and scale it to size (width, height): area averages to shrink, Lanczos to
    enlarge, as in kohya's scripts."""
    shrinks = box[2] - box[0] >= size[0] and box[3] - box[1] >= size[1]
    resample = Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS
    return image.resize(size, resample, box=box)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 [3, H, W] in -1 ... 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1

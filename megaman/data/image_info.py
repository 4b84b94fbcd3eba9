"""What is known about an image before training: from the file index, or else from the file."""

from __future__ import annotations

from pathlib import Path

from megaman.data.crops import AUTO, LANCZOS
from megaman.data.file_index import FileIndex
from megaman.data.images import (
    MIN_SIDE,
    MIN_SPRITE_SIDE,
    BadImageError,
    ImageInfo,
    image_size,
    open_transparent,
    too_small,
)
from megaman.files import Stamp, stamp_of

CELL = "pixel art 3"  # the topic of cells in the file index; the number is the rule's version


def read_info(
    image: Path, file_index: FileIndex | None, upscale: str, resolution: int
) -> ImageInfo:
    """Size and digest of an image, and its cell if it is smaller than resolution in pixels and
    enlarged like pixel art.

    Raises BadImageError if the image is of no use.
    """
    try:
        stamp = stamp_of(image)
    except OSError as error:
        raise BadImageError(f"cannot be read ({error.strerror})") from None
    min_side = MIN_SIDE if upscale == LANCZOS else MIN_SPRITE_SIDE
    if file_index and (fact := file_index.get(image, stamp)):
        digest, width, height = fact.split()
        info = ImageInfo(int(width), int(height), stamp.size, bytes.fromhex(digest))
    else:
        info = ImageInfo(*image_size(image, min_side), stamp.size)
    short = min(info.size)
    if upscale != LANCZOS and short < resolution:
        info = info._replace(cell=_read_cell(image, stamp, file_index, upscale))
    if short < MIN_SIDE and not info.cell:
        raise too_small(*info.size)
    return info


def _read_cell(image: Path, stamp: Stamp, file_index: FileIndex | None, upscale: str) -> int:
    """The side of the image's cells in pixels; with AUTO, 0 unless it is pixel art."""
    topic = f"{CELL} {upscale}"
    if file_index and (fact := file_index.get(image, stamp, topic)):
        return int(fact)
    from megaman.data import pixel_art  # loads numpy

    try:
        decoded = open_transparent(image)
    except BadImageError:
        return 0  # reported when it is encoded, as all damaged images
    is_pixel_art = upscale != AUTO or pixel_art.is_pixel_art(decoded)
    cell = pixel_art.cell_side(decoded) if is_pixel_art else 0
    if file_index:
        file_index.update([(image, stamp, str(cell))], topic)
    return cell

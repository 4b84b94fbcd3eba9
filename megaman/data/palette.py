"""The colors of images, and the palette that pixel art in a training set shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from megaman.data.images import BadImageError, flatten, image_size, open_transparent

MAX_COLORS = 256
FEW_COLORS = 64  # of one image; no photograph and hardly a smooth drawing has so few
MAX_IMAGES = 200  # looked at, spread over the training set
MAX_SIDE = 2048  # pixels: larger images are hardly pixel art, and slow to decode


def colors_of(image: Image.Image, limit: int = 2**24) -> list[str]:
    """The colors of an RGB image as rrggbb, the most frequent first; none if there are more than
    limit."""
    # Pillow clears a table of this size: with 2**24 entries a tenth of a second for any image.
    counts = image.getcolors(min(limit, image.width * image.height)) or []
    ordered = sorted(counts, key=lambda entry: -entry[0])
    return [bytes(color).hex() for _, color in ordered if isinstance(color, tuple)]


def shared_palette(images: Sequence[Path], background: str) -> list[str]:
    """The colors of the pixel art among these images, flattened on a background as #rrggbb: those
    of the most images first, at most MAX_COLORS as rrggbb.

    Empty unless at least half of the images are pixel art of few colors: of photographs or JPEGs
    there is no palette.
    """
    looked_at = images[:: -(-len(images) // MAX_IMAGES)] if images else []
    counts: Counter[str] = Counter()
    num_others = 0
    for path in looked_at:
        try:
            colors = _few_colors(path, background)
        except BadImageError:  # deleted or changed since
            colors = []
        counts.update(colors)
        if not colors:
            num_others += 1
        if 2 * num_others > len(looked_at):
            return []
    return [color for color, _ in counts.most_common(MAX_COLORS)]


def _few_colors(path: Path, background: str) -> list[str]:
    """The colors of an image if it is pixel art of few colors."""
    from megaman.data.pixel_art import is_pixel_art  # loads numpy

    if max(image_size(path, min_side=1)) > MAX_SIDE:
        return []
    image = open_transparent(path)
    colors = colors_of(flatten(image, background), FEW_COLORS)
    return colors if colors and is_pixel_art(image) else []

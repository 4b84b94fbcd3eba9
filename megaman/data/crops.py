"""What the model sees of an image: crops of a bucket's shape, scaled to its size; of pixel art, the
whole image, enlarged by a whole factor and padded."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, cast

from PIL import Image

from megaman.data.images import WHITE, Box, crop_and_resize, crop_boxes, flatten, to_tensor

if TYPE_CHECKING:
    import torch

    from megaman.data.buckets import Size

LANCZOS, NEAREST, AUTO = "lanczos", "nearest", "auto"


@dataclass(frozen=True)
class Rendering:
    """How an image becomes the pixels of its crops.

    Args:
        upscale: how images are enlarged: LANCZOS; NEAREST, by whole factors; or AUTO, which takes
            NEAREST for pixel art.
        background: what is seen through transparency, as #rrggbb.
        alpha_mask: whether crops have a fourth channel, the image's opacity.
    """

    upscale: str = LANCZOS
    background: str = WHITE
    alpha_mask: bool = False

    def key(self) -> str:
        """What crops in the latent cache depend on; "" for the defaults, which earlier caches
        have."""
        background = "" if self.background == WHITE else f" on {self.background}"
        return background + (" with alpha" if self.alpha_mask else "")


class Crop(NamedTuple):
    """One version of an image to train on: cut out box, scale it to size, mirror it.

    With a cell, whose side is in pixels, the cells of the box are enlarged by a whole factor with
    nearest neighbor and padded to size.
    """

    box: Box
    size: Size
    mirrored: bool
    cell: int = 0


def make_boxes(
    width: int, height: int, count: int, rng: random.Random | None, size: Size, cell: int
) -> tuple[list[Box], int]:
    """The boxes of an image's crops and their cell, 0 unless the image has one and is enlarged.

    The whole image is one box if its cells fit into size; otherwise see `images.crop_boxes`.
    """
    boxes = crop_boxes(width, height, count, rng, size)
    left, top, right, bottom = boxes[0]
    if not cell or (right - left >= size[0] and bottom - top >= size[1]):
        return boxes, 0
    if width // cell <= size[0] and height // cell <= size[1]:
        return [(0, 0, width, height)], cell
    aligned = [_align(box, cell) for box in boxes]
    return list(dict.fromkeys(aligned)), cell


def _align(box: Box, cell: int) -> Box:
    """The box moved and reduced to whole cells."""
    left, top = box[0] // cell * cell, box[1] // cell * cell
    columns, rows = max(1, (box[2] - box[0]) // cell), max(1, (box[3] - box[1]) // cell)
    return left, top, left + columns * cell, top + rows * cell


def render_crops(
    image: Image.Image, crops: Sequence[Crop], rendering: Rendering
) -> list[torch.Tensor]:
    """The pixels of these crops of an image in RGB or RGBA, whose boxes are within it: each float32
    [3, H, W] in -1 ... 1, or [4, H, W] with the opacity from 0 to 1 as the last channel."""
    opaque = flatten(image, rendering.background)
    upright: dict[tuple[Box, Size, int], torch.Tensor] = {}
    for crop in crops:
        key = crop.box, crop.size, crop.cell
        if key in upright:
            continue
        padding = rendering.background if image.mode == "RGBA" else None
        upright[key] = to_tensor(_scale(opaque, crop, padding))
        if rendering.alpha_mask:
            upright[key] = _with_opacity(upright[key], image, crop)
    tensors = []
    for crop in crops:
        pixel_values = upright[crop.box, crop.size, crop.cell]
        tensors.append(pixel_values.flip(-1) if crop.mirrored else pixel_values)
    return tensors


def render_small(image: Image.Image, crop: Crop, rendering: Rendering, side: int) -> Image.Image:
    """A crop of an image in RGB or RGBA, squeezed into a square of so many pixels, not mirrored."""
    opaque = flatten(image, rendering.background)
    if not crop.cell:
        return crop_and_resize(opaque, crop.box, (side, side))
    padding = rendering.background if image.mode == "RGBA" else None
    return _scale(opaque, crop, padding).resize((side, side), Image.Resampling.BOX)


def _scale(image: Image.Image, crop: Crop, padding: str | int | None) -> Image.Image:
    """The box at the size of the crop; padding of None is the color of the edges."""
    if not crop.cell:
        return crop_and_resize(image, crop.box, crop.size)
    cells = reduce_cells(image.crop(crop.box), crop.cell)
    return enlarge_cells(cells, crop.size, edge_color(cells) if padding is None else padding)


def _with_opacity(pixel_values: torch.Tensor, image: Image.Image, crop: Crop) -> torch.Tensor:
    """The pixels [4, H, W] with the opacity of the crop; padding is transparent."""
    import torch

    alpha = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
    opacity = to_tensor(_scale(alpha, crop, padding=0).convert("RGB"))[:1]
    return torch.cat([pixel_values, (opacity + 1) / 2])


def reduce_cells(image: Image.Image, cell: int) -> Image.Image:
    """One pixel for each cell, the one in its middle."""
    size = max(1, image.width // cell), max(1, image.height // cell)
    return image.resize(size, Image.Resampling.NEAREST)


def enlarge_cells(
    image: Image.Image, size: Size, padding: str | int | tuple[int, ...]
) -> Image.Image:
    """The image enlarged by the largest whole factor that fits into size, in the middle of it."""
    factor = max(1, min(size[0] // image.width, size[1] // image.height))
    width, height = image.width * factor, image.height * factor
    canvas = Image.new(image.mode, size, padding)
    enlarged = image.resize((width, height), Image.Resampling.NEAREST)
    canvas.paste(enlarged, ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def edge_color(image: Image.Image) -> tuple[int, ...]:
    """The most frequent color along the edges of an RGB image."""
    width, height = image.size
    strips = [
        image.crop((0, 0, width, 1)),
        image.crop((0, height - 1, width, height)),
        image.crop((0, 0, 1, height)),
        image.crop((width - 1, 0, width, height)),
    ]
    pixels = chain.from_iterable(strip.get_flattened_data() for strip in strips)
    return Counter(cast("Iterator[tuple[int, ...]]", pixels)).most_common(1)[0][0]

"""Checks of a training set's images for the dataset doctor: are they readable, large enough, sharp
and distinct? Their shapes and buckets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megaman.doctor.duplicates import Pair, near_duplicates
from megaman.doctor.findings import CheckedImage, Finding
from megaman.errors import plural

if TYPE_CHECKING:
    from megaman.data.buckets import Buckets

BLURRED = 0.26  # sharpness below which no edge is narrower than about four pixels
MAX_ENLARGEMENT = 2  # an image enlarged this often shows nothing at the training size
MAX_ELONGATION = 1.5  # of an image that a square shows well
ASPECT_RATIOS = {
    "1:3": 1 / 3,
    "1:2": 1 / 2,
    "9:16": 9 / 16,
    "2:3": 2 / 3,
    "3:4": 3 / 4,
    "4:5": 4 / 5,
    "1:1": 1,
    "5:4": 5 / 4,
    "4:3": 4 / 3,
    "3:2": 3 / 2,
    "16:9": 16 / 9,
    "2:1": 2,
    "3:1": 3,
}


def count_buckets(images: Sequence[CheckedImage], buckets: Buckets | None) -> dict[str, int]:
    """How many images go to each bucket, from tall to wide."""
    if buckets is None:
        return {}
    sizes = Counter(buckets.size_for(image.width, image.height) for image in images)
    return {f"{w}x{h}": sizes[w, h] for w, h in sorted(sizes, key=lambda size: size[0] / size[1])}


def count_shapes(images: Sequence[CheckedImage]) -> dict[str, int]:
    """How many images have each of the ASPECT_RATIOS, from tall to wide."""
    counts = Counter(nearest_shape(image.width, image.height) for image in images)
    return {name: counts[name] for name in ASPECT_RATIOS if counts[name]}


def nearest_shape(width: int, height: int) -> str:
    """The nearest of the usual aspect ratios, by the factor between them."""

    def distance(name: str) -> float:
        return max(ASPECT_RATIOS[name] * height / width, width / height / ASPECT_RATIOS[name])

    return min(ASPECT_RATIOS, key=distance)


def check_readable(reasons: dict[str, str]) -> Iterator[Finding]:
    """Files that cannot be used, by path with the reason."""
    if reasons:
        yield Finding(
            "unreadable",
            True,
            f"{plural(len(reasons), 'image')} cannot be used",
            "Fix or remove them: training skips them",
            list(reasons),
            reasons,
        )


def check_sorted_out(reasons: dict[str, str]) -> Iterator[Finding]:
    """Files that the folder's layout excludes on purpose, by path with the reason."""
    if reasons:
        yield Finding(
            "sorted_out",
            False,
            f"{plural(len(reasons), 'image')} sorted out: {next(iter(reasons.values()))}",
            "Right if they are not to be trained on",
            list(reasons),
            reasons,
        )


def check_sizes(
    images: Sequence[CheckedImage], resolution: int, squares: bool
) -> Iterator[Finding]:
    """Images that have to be enlarged and, if all are cropped to squares, those of which a square
    shows little."""
    sizes = {image.path: f"{image.width}x{image.height}" for image in images}
    short = {
        image.path: min(image.width, image.height) for image in images if not image.is_pixel_art
    }
    yield from _pixel_art([image for image in images if image.is_pixel_art], sizes, resolution)
    yield from _tiny(short, sizes, resolution)
    small = [path for path, side in short.items() if side < resolution < side * MAX_ENLARGEMENT]
    if small:
        yield Finding(
            "small",
            False,
            f"{plural(len(small), 'image')} smaller than --resolution {resolution}",
            "They are enlarged a little; larger ones would be sharper",
            small,
            sizes,
        )
    long = [
        image.path
        for image in images
        if not image.is_pixel_art  # which is seen as a whole
        and max(image.width, image.height) > MAX_ELONGATION * min(image.width, image.height)
    ]
    if long and squares:
        yield Finding(
            "long",
            False,
            f"{plural(len(long), 'image')} far from square",
            "A square shows less than two thirds of them: "
            "train with --enable_bucket, or crop them yourself",
            long,
            sizes,
        )


def _pixel_art(
    images: Sequence[CheckedImage], sizes: dict[str, str], resolution: int
) -> Iterator[Finding]:
    """Pixel art that is enlarged by whole factors."""
    if images:
        yield Finding(
            "pixel_art",
            False,
            f"{plural(len(images), 'image')} of pixel art, smaller than --resolution {resolution}",
            "Right for sprites: pixels become squares of one color, the rest is padding; "
            "--upscale lanczos would smooth them",
            [image.path for image in images],
            sizes,
        )


def _tiny(short: dict[str, int], sizes: dict[str, str], resolution: int) -> Iterator[Finding]:
    """Images with too short a side, given the short side of each in pixels."""
    files = [path for path, side in short.items() if side * MAX_ENLARGEMENT <= resolution]
    if files:
        count = plural(len(files), "image")
        if len(files) == len(short):
            count = f"all {count}"
        yield Finding(
            "tiny",
            True,
            f"{count} at most half as large as --resolution {resolution}",
            "Find larger ones, lower --resolution, or remove them: enlarged they teach blur",
            files,
            sizes,
        )


def check_sharpness(images: Sequence[CheckedImage]) -> Iterator[Finding]:
    """Images without sharp edges."""
    values = {image.path: image.sharpness for image in images if image.sharpness is not None}
    files = [path for path, value in values.items() if value < BLURRED]
    if files:
        yield Finding(
            "blurred",
            True,
            f"{plural(len(files), 'image')} blurred",
            "Use the original at its full size, or remove them: a LoRA learns the blur too",
            files,
            {
                path: f"sharpness {value:.2f}, sharp from {BLURRED}"
                for path, value in values.items()
                if value
            },
        )


def check_duplicates(images: Sequence[CheckedImage], thumbnails: np.ndarray) -> Iterator[Finding]:
    """Near-duplicates among the images, by their thumbnails in the same order
    (`near_duplicates`)."""
    pairs = [
        (images[pair.first].path, images[pair.second].path, describe_difference(pair, images))
        for pair in near_duplicates(thumbnails)
    ]
    if pairs:
        files: dict[str, None] = {}  # an ordered set
        for one, other, _ in pairs:
            files |= {one: None, other: None}
        details = {image.path: f"{image.width}x{image.height}" for image in images}
        details |= {other: f"{details[other]}, {difference}" for _, other, difference in pairs}
        yield Finding(
            "duplicates",
            True,
            f"{plural(len(files), 'image')} nearly the same as another",
            "Keep the best of each group: what is there twice is learned twice as hard",
            list(files),
            details,
            pairs,
        )


def describe_difference(pair: Pair, images: Sequence[CheckedImage]) -> str:
    """How two near-duplicates differ, in a word or two."""
    one, other = images[pair.first], images[pair.second]
    words = []
    if pair.mirrored:
        words.append("mirrored")
    if pair.cropped:
        words.append("cropped")
    elif (one.width, one.height) != (other.width, other.height):
        words.append("resized")
    return ", ".join(words) or "the same image"

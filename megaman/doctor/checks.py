"""The dataset doctor: checks a folder of images and captions and returns a report as data. No
model, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megaman.data.captions import trigger_words
from megaman.doctor.caption_checks import (
    check_captions,
    check_metadata,
    check_terms,
    check_trigger,
    count_terms,
    split_terms,
)
from megaman.doctor.duplicates import Pair, near_duplicates
from megaman.doctor.findings import CheckedImage, Finding, plural, relative_name
from megaman.doctor.image_stats import THUMBNAIL_SIDE, ImageStats, measure_images

if TYPE_CHECKING:
    from megaman.data.buckets import Buckets
    from megaman.data.dataset import MegaManDataset
    from megaman.data.folders import Example

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


@dataclass(frozen=True)
class Report:
    """Everything that the doctor found.

    Args:
        data_dir: the folder.
        resolution: the training size in pixels.
        trigger: the trigger words, given or inferred; "" if there are none.
        images: all of them, the unreadable ones first.
        findings: what is wrong first.
        term: what terms counts: "tags", or "words" if the captions are sentences.
        terms: in how many captions each occurs.
        shapes: images per aspect ratio.
        buckets: images per bucket, such as 448x576; empty if all are cropped to squares.
    """

    data_dir: Path
    resolution: int
    trigger: str
    images: list[CheckedImage]
    findings: list[Finding]
    term: str
    terms: Counter[str]
    shapes: dict[str, int]
    buckets: dict[str, int]

    @property
    def readable(self) -> list[CheckedImage]:
        """The images that could be decoded."""
        return [image for image in self.images if image.width]

    @property
    def is_wrong(self) -> bool:
        """Whether any finding is wrong for sure."""
        return any(finding.is_wrong for finding in self.findings)


@dataclass(frozen=True)
class _Inspection:
    """The images of a dataset, decoded.

    Args:
        images: those that could be read.
        thumbnails: uint8 [N, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3], in the same order.
        warnings: about caption files, by the path of the image.
        unreadable: why the other files cannot be used.
    """

    images: list[CheckedImage]
    thumbnails: np.ndarray
    warnings: dict[str, tuple[Path, str]]
    unreadable: dict[Path, str]


def examine(
    dataset: MegaManDataset,
    resolution: int,
    trigger: str | None = None,
    progress: Callable[[Iterable[ImageStats]], Iterable[ImageStats]] = iter,
) -> Report:
    """Check every image and caption of a dataset, whether or not its headers have been checked.

    resolution is the training size in pixels, trigger the words that every caption should contain
    (None: those on which the captions agree, if any). progress can wrap the images to show a bar.
    """
    folder = dataset.data_dir
    inspection = _inspect(dataset, resolution, progress)
    images = inspection.images
    captions = [image.caption for image in images if image.caption_from_file]
    words = trigger_words(captions) if trigger is None else trigger
    term, terms = split_terms(captions)
    unreadable = [CheckedImage(relative_name(file, folder), file) for file in inspection.unreadable]
    reasons = dict(
        zip((image.path for image in unreadable), inspection.unreadable.values(), strict=True)
    )
    findings = [
        *check_readable(reasons),
        *check_sizes(images, resolution, squares=dataset.buckets is None),
        *check_sharpness(images),
        *check_duplicates(images, inspection.thumbnails),
        *check_captions(images, inspection.warnings, folder),
        *check_metadata(dataset.metadata_warnings, folder),
        *check_trigger(images, words, inferred=trigger is None),
        *check_terms(images, term, terms, words),
    ]
    findings.sort(key=lambda finding: not finding.is_wrong)
    everything = [*unreadable, *images]
    _link_findings(findings, everything)
    return Report(
        folder,
        resolution,
        words,
        everything,
        findings,
        term,
        count_terms(terms),
        count_shapes(images),
        count_buckets(images, dataset.buckets),
    )


def _inspect(
    dataset: MegaManDataset,
    resolution: int,
    progress: Callable[[Iterable[ImageStats]], Iterable[ImageStats]],
) -> _Inspection:
    # An image that is repeated is not a duplicate of itself.
    examples = {example.image: example for example in dataset.examples}
    all_stats = progress(measure_images(list(examples), resolution))
    images: list[CheckedImage] = []
    thumbnails: list[np.ndarray] = []
    warnings: dict[str, tuple[Path, str]] = {}
    unreadable = dict(dataset.skipped)
    for example, stats in zip(examples.values(), all_stats, strict=True):
        if stats.problem is not None or stats.thumbnail is None:
            unreadable[example.image] = stats.problem or "cannot be read"
            continue
        image = _checked_image(example, stats, dataset.data_dir)
        images.append(image)
        thumbnails.append(stats.thumbnail)
        if example.caption_warning:
            warnings[image.path] = example.caption_warning
    empty = np.empty((0, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
    stacked = np.stack(thumbnails) if thumbnails else empty
    return _Inspection(images, stacked, warnings, unreadable)


def _checked_image(example: Example, stats: ImageStats, folder: Path) -> CheckedImage:
    return CheckedImage(
        relative_name(example.image, folder),
        example.image,
        example.caption,
        example.caption_from_file,
        stats.width,
        stats.height,
        stats.sharpness,
        stats.preview,
    )


def _link_findings(findings: Iterable[Finding], images: Iterable[CheckedImage]) -> None:
    """Note in every image the kinds of the findings that name it."""
    by_path = {image.path: image for image in images}
    for finding in findings:
        for path in finding.files:
            by_path[path].kinds.append(finding.kind)


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
            f"{plural(len(reasons), 'picture')} cannot be used",
            "The report says why for each; fix or remove them: training skips them",
            list(reasons),
            reasons,
        )


def check_sizes(
    images: Sequence[CheckedImage], resolution: int, squares: bool
) -> Iterator[Finding]:
    """Images that have to be enlarged and, if all are cropped to squares, those of which a square
    shows little."""
    sizes = {image.path: f"{image.width}x{image.height}" for image in images}
    short = {image.path: min(image.width, image.height) for image in images}
    yield from _tiny(short, sizes, resolution)
    small = [path for path, side in short.items() if side < resolution < side * MAX_ENLARGEMENT]
    if small:
        yield Finding(
            "small",
            False,
            f"{plural(len(small), 'picture')} smaller than --resolution {resolution}",
            "They are enlarged a little; larger ones would be sharper",
            small,
            sizes,
        )
    long = [
        image.path
        for image in images
        if max(image.width, image.height) > MAX_ELONGATION * min(image.width, image.height)
    ]
    if long and squares:
        yield Finding(
            "long",
            False,
            f"{plural(len(long), 'picture')} far from square",
            "A square shows less than two thirds of them: "
            "train with --enable_bucket, or crop them yourself",
            long,
            sizes,
        )


def _tiny(short: dict[str, int], sizes: dict[str, str], resolution: int) -> Iterator[Finding]:
    """Images with too short a side, given the short side of each in pixels."""
    files = [path for path, side in short.items() if side * MAX_ENLARGEMENT <= resolution]
    if files:
        count = plural(len(files), "picture")
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
            f"{plural(len(files), 'picture')} blurred",
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
            f"{plural(len(files), 'picture')} nearly the same as another",
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
    return ", ".join(words) or "the same picture"

"""The dataset doctor: checks a folder of images and captions and returns a report as data. No
model, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megaman.data.captions import trigger_words
from megaman.doctor.balance_checks import check_balance
from megaman.doctor.caption_checks import (
    check_captions,
    check_class_captions,
    check_metadata,
    check_trigger,
)
from megaman.doctor.findings import CheckedImage, Finding, relative_name
from megaman.doctor.image_checks import (
    check_duplicates,
    check_readable,
    check_sharpness,
    check_sizes,
    check_sorted_out,
    count_buckets,
    count_shapes,
)
from megaman.doctor.image_stats import THUMBNAIL_SIDE, ImageStats, measure_images
from megaman.doctor.term_checks import check_terms, count_terms, split_terms

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset
    from megaman.data.folders import Example


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
    is_class: bool = False,
) -> Report:
    """Check every image and caption of a dataset, whether or not its headers have been checked.

    resolution is the training size in pixels, trigger the words that every caption should contain
    (None: those on which the captions agree, if any). progress can wrap the images to show a bar.
    With is_class these are class images, which must not have the trigger words and may share
    captions.
    """
    folder = dataset.data_dir
    inspection = _inspect(dataset, resolution, progress)
    images = inspection.images
    captions = [image.caption for image in images if image.caption_from_file]
    words = trigger_words(captions) if trigger is None else trigger
    if is_class:
        about_trigger = check_class_captions(images, words)
    else:
        about_trigger = check_trigger(images, words, inferred=trigger is None)
    term, terms = split_terms(captions)
    unreadable = [CheckedImage(relative_name(file, folder), file) for file in inspection.unreadable]
    reasons = {
        relative_name(file, folder): reason
        for file, reason in inspection.unreadable.items()
        if file not in dataset.sorted_out
    }
    sorted_out = {
        relative_name(file, folder): reason for file, reason in dataset.sorted_out.items()
    }
    findings = [
        *check_readable(reasons),
        *check_sorted_out(sorted_out),
        *check_sizes(images, resolution, squares=dataset.buckets is None),
        *check_sharpness(images),
        *check_duplicates(images, inspection.thumbnails),
        *check_captions(images, inspection.warnings, folder, may_share=is_class),
        *check_metadata(dataset.metadata_warnings, folder),
        *about_trigger,
        *check_terms(images, term, terms, None if is_class else words),
        *([] if is_class else check_balance(images, words)),
    ]
    findings.sort(key=lambda finding: not finding.is_wrong)
    everything = [*unreadable, *images]
    _link_findings(findings, everything)
    return Report(
        folder,
        resolution,
        "" if is_class else words,
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
        example.info is not None and example.info.cell > 0,
        stats.sharpness,
        stats.preview,
    )


def _link_findings(findings: Iterable[Finding], images: Iterable[CheckedImage]) -> None:
    """Note in every image the kinds of the findings that name it."""
    by_path = {image.path: image for image in images}
    for finding in findings:
        for path in finding.files:
            by_path[path].kinds.append(finding.kind)

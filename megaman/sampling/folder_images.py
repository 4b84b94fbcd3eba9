"""The images in a generation's output folder: those that the page lists, those that a stopped run
left, damaged ones."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import UserError
from megaman.pages.gallery_images import GalleryImage
from megaman.sampling import png, record_reader, records
from megaman.sampling.jobs import base_image_file, pixel_image_file

if TYPE_CHECKING:
    from megaman.sampling.records import Record

NUMBERED = re.compile(r"megaman_(\d+)_\d+.*\.png")

FindRecord = Callable[[Path], "Record | None"]


def images_on_disk(folder: Path, images: list[GalleryImage]) -> list[GalleryImage]:
    """The gallery's images without those that were deleted, each with its base's image if it is
    there."""

    def exists(file: str) -> bool:  # "./" keeps "//host/x" from naming another machine
        return os.path.isfile(f"{folder}/./{file}")

    present = []
    for image in images:
        if not exists(image.file):
            continue
        base_file = image.base_file or base_image_file(image.file)
        pixel_file = image.pixel_file or pixel_image_file(image.file)
        present.append(
            replace(
                image,
                base_file=base_file if exists(base_file) else None,
                pixel_file=pixel_file if exists(pixel_file) else None,
            )
        )
    return present


def add_unlisted(
    folder: Path, images: list[GalleryImage], find_record: FindRecord = record_reader.find_record
) -> list[GalleryImage]:
    """The gallery's images, and those that a killed run saved before the page listed them."""
    listed = {file for image in images for file in (image.file, image.base_file)}
    unlisted = []
    for path in sorted(folder.glob("megaman_*.png")):
        if path.name in listed or path.name.endswith(("_base.png", "_pixel.png")):
            continue
        record = find_record(path)
        if record and png.is_whole(path):
            base = path.with_name(base_image_file(path.name))
            base_file = base.name if base.is_file() else None
            pixel = path.with_name(pixel_image_file(path.name))
            pixel_file = pixel.name if pixel.is_file() else None
            unlisted.append(records.gallery_image(path.name, record, base_file, pixel_file))
    return [*images, *unlisted]


def first_free(folder: Path) -> int:
    """The first prompt number after those of all images in the folder."""
    names = [path.name for path in folder.glob("megaman_*.png")]
    matches = filter(None, map(NUMBERED.fullmatch, names))
    return max((int(match[1]) for match in matches), default=-1) + 1


def first_of_stopped(
    folder: Path,
    wanted: Sequence[tuple[int, Record]],
    find_record: FindRecord = record_reader.find_record,
) -> int | None:
    """The number of the first prompt in the run that was stopped, or None if there is no image
    of it.

    wanted are the prompt indices with the records that their images would have, also those of the
    base. Each image that fits votes for the number that its own number and index imply.
    """
    indices: dict[tuple, list[int]] = {}
    for prompt_index, record in wanted:
        indices.setdefault(record.identity, []).append(prompt_index)
    votes: Counter[int] = Counter()
    for path in folder.glob("megaman_*.png"):
        match = NUMBERED.fullmatch(path.name)
        if match is None:
            continue
        if record := find_record(path):
            number = int(match[1])
            fitting = indices.get(record.identity, [])
            votes.update({number - index for index in fitting if index <= number})
    return max(votes, key=lambda first: (votes[first], first)) if votes else None


def is_complete(
    path: Path, record: Record, find_record: FindRecord = record_reader.find_record
) -> bool:
    """Whether the image exists and is whole; raises UserError if another one has its name."""
    if not path.exists():
        return False
    found = None if path.is_dir() else find_record(path)
    is_same = found is not None and found.identity == record.identity
    if not path.is_dir() and not png.is_whole(path) and (found is None or is_same):
        return False
    if not is_same:
        raise UserError(
            f"--resume: {path} is not an image that this command generates",
            "Use the flags of the stopped run, or omit --resume",
        )
    return True


def keep_damaged(path: Path) -> Path:
    """Rename a damaged image, so that it can be generated again; returns the free name taken."""
    names = (f"damaged{count}_{path.name}" for count in chain([""], itertools.count(2)))
    kept = next(name for name in names if not path.with_name(name).exists())
    return path.rename(path.with_name(kept))

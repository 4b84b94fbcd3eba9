"""How a folder of images is laid out: caption files, metadata files, kohya's folders; what it says
about each image."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

from megaman.data.captions import Caption, caption_file, caption_for, tidy
from megaman.data.image_files import find_images
from megaman.data.images import ImageInfo
from megaman.data.metadata_files import NAMES, Row, find_unread, inner_path, read_metadata

MAX_REPEATS = 1000  # 2024_summer is a name
MAX_WARNINGS = 20  # per metadata file; the rest is counted
MAX_MISSING = 1000  # images that a metadata file names but that do not exist
FROM_FILE_NAME, FROM_FOLDER_NAME = "made from file names", "made from folder names"
MAX_SHOWN_NAME = 100  # characters of a file name in a warning


@dataclass(frozen=True)
class FolderConfig:
    """How to read a folder of images.

    Args:
        caption_extension: of the caption files next to the images; None for .txt, then .caption.
        repeats: how often every image counts in an epoch, multiplied by the number of its folder if
            that is kohya's 10_name.
        flag: of the command line that named the folder, for error messages.
    """

    caption_extension: str | None = None
    repeats: int = 1
    flag: str = "--data_dir"


@dataclass(slots=True)
class Example:
    """An image and its caption.

    Args:
        image: path of the image.
        caption: the text to train with.
        caption_from_file: whether somebody wrote the caption; otherwise it was made from a name.
        source: where the caption comes from, in words.
        repeats: how often the image is seen in an epoch.
        folder: the folder that sets the repeats.
        caption_warning: the path of the caption file and what the user should know about it.
        info: size and digest, once the image's header has been read.
        truncated: the end of the caption beyond the text encoder's positions, once known.
    """

    image: Path
    caption: str
    caption_from_file: bool
    source: str
    repeats: int
    folder: Path
    caption_warning: tuple[Path, str] | None = None
    info: ImageInfo | None = None
    truncated: str = ""


class Layout(NamedTuple):
    """The images in natural order, what is skipped and why, which of that is sorted out on purpose,
    warnings about metadata files, and what is wrong with those that are not understood although
    images depend on them."""

    examples: list[Example]
    skipped: dict[Path, str]
    sorted_out: dict[Path, str]
    metadata_warnings: list[tuple[Path, str]]
    unread_metadata: dict[Path, str]


def read_layout(folder: Path, config: FolderConfig) -> Layout:
    """Find every image below a folder with its caption and repeats.

    A caption comes from the metadata file (`metadata_files.NAMES`) of the image's folder, or of the
    nearest one above, that names the image; else from the caption file with the image's stem; else
    from the name of kohya's folder 10_name; else from the image's name. Below a metadata file, an
    image that is neither named there nor has a caption file is skipped, as in imagefolder; so is
    every image without a caption file below a metadata file that is not understood.

    The number of the nearest folder 10_name below the given one multiplies the repeats.
    """
    images, skipped = find_images(folder)
    metadata = _MetadataFiles(folder, images)
    kohya_folder_of = cache(partial(_kohya_folder, folder))
    examples = []
    sorted_out: dict[Path, str] = {}
    for image in images:
        number, kohya_folder = kohya_folder_of(image.parent)
        if number == 0 and kohya_folder:
            sorted_out[image] = f"in {kohya_folder.name}, whose 0 means that it is not used"
            continue
        caption = caption_for(image, config.caption_extension)
        if not caption.from_file:
            if reason := metadata.reason_to_refuse(image):
                skipped[image] = reason
                continue
            if reason := metadata.reason_to_sort_out(image):
                sorted_out[image] = reason
                continue
        if row := metadata.caption_row(image):
            caption, source = _from_metadata(row, caption, image, config.caption_extension)
        else:
            caption, source = _from_file_or_name(caption, kohya_folder)
        repeats = config.repeats * (number or 1)
        text, from_file, warning, _ = caption
        place = kohya_folder or folder
        examples.append(Example(image, text, from_file, source, repeats, place, warning))
    skipped |= sorted_out | metadata.missing
    return Layout(examples, skipped, sorted_out, metadata.warnings, metadata.needed)


def _from_metadata(
    row: _ImageRow, own: Caption, image: Path, extension: str | None
) -> tuple[Caption, str]:
    """The caption of a metadata row and its source; own is that of the image's caption file."""
    warning = None
    if own.from_file and own.text != row.caption:
        path = caption_file(image, extension)
        warning = path and (path, f"says something else than {row.file.name}, which counts")
    return Caption(row.caption, True, warning), f"from {row.file.name}"


def _from_file_or_name(caption: Caption, kohya_folder: Path | None) -> tuple[Caption, str]:
    """The caption and its source; the name of kohya's folder replaces one made from the image's
    name."""
    if caption.from_file:
        return caption, sys.intern(f"from {caption.suffix} files")
    words = tidy(kohya_folder.name.partition("_")[2]) if kohya_folder else ""
    if not words:
        return caption, FROM_FILE_NAME
    warning = None
    if caption.warning:
        path, text = caption.warning
        warning = path, text.replace("image's name", "folder's name")
    return Caption(words, False, warning), FROM_FOLDER_NAME


def _kohya_folder(folder: Path, place: Path) -> tuple[int | None, Path | None]:
    """The number and the path of the nearest 10_name between an image's folder and the given one,
    which does not count itself."""
    for parent in (place, *place.parents)[: len(place.relative_to(folder).parts)]:
        match = re.match(r"(\d+)_", parent.name, re.ASCII)
        if match and len(match[1]) < 10 and int(match[1]) <= MAX_REPEATS:
            return int(match[1]), parent
    return None, None


def summarize_sources(sources: Iterable[str]) -> str:
    """How many captions come from where: 20 from .txt files, 4 from metadata.jsonl."""
    return ", ".join(f"{count} {source}" for source, count in Counter(sources).most_common())


class _ImageRow(NamedTuple):
    """A metadata file's row that names an image."""

    file: Path
    line: int
    caption: str


class _MetadataFiles:
    """The metadata files of a folder: rows by image, images that are named but missing, warnings
    about the rest."""

    def __init__(self, folder: Path, images: Sequence[Path]):
        self.missing: dict[Path, str] = {}
        self.warnings: list[tuple[Path, str]] = []
        self._rows: dict[Path, _ImageRow] = {}
        self.needed: dict[Path, str] = {}  # files that are not understood: what is wrong with them
        self._refused: dict[Path, str] = {}  # images that are named in a way that cannot be used
        self._unread: dict[Path, str] = {}
        self._with_bad_lines: set[Path] = set()
        self._file_of: dict[Path, Path] = {}  # folder: its first metadata file
        self._images = images
        self._root = os.path.realpath(folder)
        for parent in _folders_of(folder, images):
            for name in NAMES:
                if os.path.lexists(parent / name):
                    self._read(parent / name)
            for path in find_unread(parent):
                self.warnings.append(
                    (path, "is not read: its name has to be metadata.csv or metadata.jsonl")
                )

    def caption_row(self, image: Path) -> _ImageRow | None:
        """The row with a caption for this image."""
        row = self._rows.get(image) if self._rows else None
        return row if row and row.caption else None

    def reason_to_refuse(self, image: Path) -> str | None:
        """Why an image without a caption file cannot be used: its line in a metadata file is not
        certain, or the file is not understood, or has such lines and does not name it."""
        if image in self._rows or image in self._refused:
            return self._refused.get(image)
        file = self._nearest_file(image)
        if file in self._unread:
            self.needed[file] = self._unread[file]
            return f"{file.name} is not understood, and it has no caption file of its own"
        if file in self._with_bad_lines:
            return f"{file.name} does not name it in a line that can be read"
        return None

    def _nearest_file(self, image: Path) -> Path | None:
        """The metadata file that counts for an image."""
        files = (self._file_of[parent] for parent in image.parents if parent in self._file_of)
        return next(files, None)

    def reason_to_sort_out(self, image: Path) -> str | None:
        """Why an image without a caption file is not used: a metadata file in its folder or above
        does not name it."""
        if image in self._rows:
            return None
        file = self._nearest_file(image)
        return file and f"{file.name} does not name it, and it has no caption file of its own"

    @cached_property
    def _image_by_name(self) -> dict[str, Path]:
        """The images by normalized name; needed only if there is a metadata file."""
        return {unicodedata.normalize("NFC", image.as_posix()): image for image in self._images}

    def _read(self, path: Path) -> None:
        metadata = read_metadata(path)
        if metadata.rows is None:
            self._unread[path] = metadata.warnings[-1] if metadata.warnings else "is empty"
        if metadata.has_bad_lines:
            self._with_bad_lines.add(path)
        earlier = self._file_of.get(path.parent)
        if earlier is None or (earlier in self._unread and metadata.rows is not None):
            self._file_of[path.parent] = path
        warnings = [*metadata.warnings, *self._add_rows(path, metadata.rows or [])]
        self.warnings += [(path, warning) for warning in warnings[:MAX_WARNINGS]]
        if len(warnings) > MAX_WARNINGS:
            self.warnings.append((path, f"and {len(warnings) - MAX_WARNINGS} lines more"))

    def _add_rows(self, path: Path, rows: Iterable[Row]) -> Iterator[str]:
        """Store the rows that name an image; yields what is wrong with the others."""
        for row in rows:
            # JSON can hold surrogates.
            name = row.file_name[:MAX_SHOWN_NAME].encode("utf-8", "backslashreplace").decode()
            if problem := self._add_row(path, row, name):
                yield f"line {row.line}: {problem}"

    def _add_row(self, path: Path, row: Row, name: str) -> str | None:
        """Store one row; returns what is wrong with it. name is the row's file name as text."""
        inner = inner_path(row.file_name)
        if inner is None:
            return f"{name} leads out of the folder, which no line may"
        target = path.parent / inner
        image = self._image_by_name.get(unicodedata.normalize("NFC", target.as_posix()))
        if image is None:
            return self._add_missing(path, row, target, name)
        if not Path(os.path.realpath(image)).is_relative_to(self._root):
            self._refused[image] = (
                f"a link out of the folder, which {path.name} may not name (line {row.line})"
            )
            return f"{name} is a link out of the folder, which no line may name"
        earlier = self._rows.get(image)
        if earlier:
            if earlier.file != path:
                return None  # the nearest file counts
            return f"{name} was named in line {earlier.line} already, which counts"
        if row.problem:
            self._refused[image] = f"{path.name}, line {row.line}: {row.problem}"
            return f"{name}: {row.problem}"
        self._rows[image] = _ImageRow(path, row.line, row.caption)
        return None if row.caption else f"no caption for {name}"

    def _add_missing(self, path: Path, row: Row, target: Path, name: str) -> str | None:
        """Note an image that is named but does not exist, or return a warning."""
        if os.path.lexists(target) or len(self.missing) >= MAX_MISSING:
            return f"{name} is not among the images that are read"
        self.missing[target] = f"is not there: {path.name} names it in line {row.line}"
        return None


def _folders_of(folder: Path, images: Iterable[Path]) -> list[Path]:
    """The folder and all below it that hold images, directly or not; the deepest first."""
    folders = {folder}
    for place in {image.parent for image in images}:
        parents = (place, *place.parents)
        folders.update(parent for parent in parents if folder in (parent, *parent.parents))
    return sorted(folders, key=lambda path: (-len(path.parts), path))

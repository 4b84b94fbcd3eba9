"""How a folder of pictures is laid out: sidecars, metadata files, kohya's folders; what it says of each picture."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megaman import imagefolder
from megaman.captions import Caption, caption_file, caption_for, tidy
from megaman.images import find_images

MOST_REPEATS = 1000  # 2024_summer is a name
MOST_REMARKS = 20  # of one metadata file; the rest is counted
MOST_MISSING = 1000  # pictures that are named and not there
FROM_FILE_NAME, FROM_FOLDER_NAME = "made from file names", "made from folder names"


class Entry(NamedTuple):
    """A picture, its caption, where that comes from, how often it is seen in an epoch, and the folder that says so."""

    picture: Path
    caption: Caption
    source: str
    repeats: int
    folder: Path


class Layout(NamedTuple):
    """The pictures in natural order, what was left out with the reasons, and remarks on metadata files."""

    entries: list[Entry]
    problems: dict[Path, str]
    remarks: list[tuple[Path, str]]


def read_layout(folder: Path, extension: str | None = None, repeats: int = 1) -> Layout:
    """Find every picture below a folder with its caption and repeats.

    A caption comes from the metadata file (imagefolder.NAMES) of the picture's folder or the nearest above that names
    the picture; else from the file of the same stem (extension alone where it is given, else .txt, then .caption);
    else from the name of kohya's folder 10_name; else from the picture's name. Below a metadata file a picture that is
    not named there and has no caption file is left out, as imagefolder does.

    repeats is a factor for all of them, on top of the number of the nearest folder 10_name below the one given.
    """
    pictures, problems = find_images(folder)
    metadata = _Metadata(folder, pictures)
    entries = []
    kohya_folder_of = cache(partial(_kohya_folder, folder))
    for picture in pictures:
        number, kohya_folder = kohya_folder_of(picture.parent)
        if number == 0:
            problems[picture] = f"in {kohya_folder.name}, whose 0 means that it is not used"
            continue
        beside = caption_for(picture, extension)
        row = metadata.rows.get(picture)
        if row and row.caption:
            remark = (caption_file(picture, extension), f"says something else than {row.file.name}, which counts")
            caption = Caption(row.caption, True, remark if beside.found and beside.text != row.caption else None)
            source = f"from {row.file.name}"
        elif beside.found:
            caption, source = beside, f"from {beside.suffix} files"
        elif not row and (reason := metadata.reason_against(picture)):
            problems[picture] = reason
            continue
        elif kohya_folder and (words := tidy(kohya_folder.name.partition("_")[2])):
            remark = beside.remark and (beside.remark[0], beside.remark[1].replace("picture's name", "folder's name"))
            caption, source = Caption(words, False, remark), FROM_FOLDER_NAME
        else:
            caption, source = beside, FROM_FILE_NAME
        entries.append(Entry(picture, caption, source, repeats * (number or 1), kohya_folder or folder))
    return Layout(entries, problems | metadata.missing, metadata.remarks)


def _kohya_folder(folder: Path, place: Path) -> tuple[int | None, Path | None]:
    """The number and the path of the nearest 10_name from a picture's place up to the folder, itself not counted."""
    for parent in (place, *place.parents)[: len(place.relative_to(folder).parts)]:
        found = re.match(r"(\d+)_", parent.name, re.ASCII)
        if found and len(found[1]) < 10 and int(found[1]) <= MOST_REPEATS:
            return int(found[1]), parent
    return None, None


class _Named(NamedTuple):
    """A metadata file's row that names a picture."""

    file: Path
    line: int
    caption: str


class _Metadata:
    """The metadata files of a folder: rows by picture, pictures that are named but missing, remarks on the rest."""

    def __init__(self, folder: Path, pictures: Iterable[Path]):
        self.folder = folder
        self.rows: dict[Path, _Named] = {}
        self.missing: dict[Path, str] = {}
        self.refused: dict[Path, str] = {}
        self.remarks: list[tuple[Path, str]] = []
        self._covered: dict[Path, Path] = {}  # folder: its first metadata file
        self._known = {unicodedata.normalize("NFC", picture.as_posix()): picture for picture in pictures}
        self._root = os.path.realpath(folder)
        places = {picture.parent for picture in self._known.values()}
        folders = {parent for place in places for parent in (place, *place.parents) if self._is_in(parent)}
        for each in sorted({folder, *folders}, key=lambda path: (-len(path.parts), path)):  # the nearest one counts
            for name in imagefolder.NAMES:
                if os.path.lexists(each / name):
                    self._read(each / name)

    def _is_in(self, path: Path) -> bool:
        return path == self.folder or self.folder in path.parents

    def _read(self, path: Path) -> None:
        found = imagefolder.read_metadata(path)
        if found.rows is not None:
            self._covered.setdefault(path.parent, path)
        count = 0
        for count, remark in enumerate(chain(found.remarks, self._take(path, found.rows or [])), start=1):
            if count <= MOST_REMARKS:
                self.remarks.append((path, remark))
        if count > MOST_REMARKS:
            self.remarks.append((path, f"and {count - MOST_REMARKS} lines more"))

    def _take(self, path: Path, rows: Iterable[imagefolder.Row]) -> Iterator[str]:
        """Keep the rows that name a picture; says what is wrong with the others."""
        for row in rows:
            inner = imagefolder.inner_path(row.file_name)
            shown = row.file_name[:100].encode("utf-8", "backslashreplace").decode("utf-8")  # JSON can hold surrogates
            if inner is None:
                yield f"line {row.line}: {shown} leads out of the folder, which no line may"
                continue
            wanted = path.parent / inner
            picture = self._known.get(unicodedata.normalize("NFC", wanted.as_posix()))
            if picture is None:
                if os.path.lexists(wanted) or len(self.missing) >= MOST_MISSING:
                    yield f"line {row.line}: {shown} is not among the pictures that are read"
                else:
                    self.missing[wanted] = f"is not there: {path.name} names it in line {row.line}"
            elif not Path(os.path.realpath(picture)).is_relative_to(self._root):
                yield f"line {row.line}: {shown} is a link out of the folder, which no line may name"
                self.refused[picture] = f"a link out of the folder, which {path.name} may not name (line {row.line})"
            elif (earlier := self.rows.get(picture)) and earlier.file == path:
                yield f"line {row.line}: {shown} was named in line {earlier.line} already, which counts"
            elif not earlier:
                self.rows[picture] = _Named(path, row.line, row.caption)
                if not row.caption:
                    yield f"line {row.line}: no caption for {shown}"

    def reason_against(self, picture: Path) -> str | None:
        """Why a picture without a caption file is left out: a metadata file at it or above does not name it."""
        if picture in self.refused:
            return self.refused[picture]
        file = next((self._covered[parent] for parent in picture.parents if parent in self._covered), None)
        return file and f"{file.name} does not name it, and it has no caption file of its own"


def describe(sources: Iterable[str]) -> str:
    """How many captions come from where: 20 from .txt files, 4 from metadata.jsonl."""
    return ", ".join(f"{count} {source}" for source, count in Counter(sources).most_common())

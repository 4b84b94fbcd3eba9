"""How a folder of pictures is laid out: sidecars, metadata files, kohya's folders; what it says of
each picture.

metadata.jsonl and metadata.csv hold the captions of many pictures in one file, as Hugging Face's
imagefolder has them.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megaman.data.captions import Caption, caption_file, caption_for, content_of, decode, tidy
from megaman.data.images import find_images

MOST_REPEATS = 1000  # 2024_summer is a name
MOST_REMARKS = 20  # of one metadata file; the rest is counted
MOST_MISSING = 1000  # pictures that are named and not there
FROM_FILE_NAME, FROM_FOLDER_NAME = "made from file names", "made from folder names"

NAMES = ("metadata.jsonl", "metadata.csv")  # where both name a picture, the first counts
CAPTION_KEYS = (
    "text",
    "caption",
)  # the first that says something counts; other columns are allowed and not read
LARGEST = 8 * 2**20  # bytes: about 50,000 captions
LARGEST_LINE = 2**20  # characters
MOST_BAD = 1000  # lines that cannot be read, before a file is given up: it is something else
DELIMITERS = ",;\t"  # spreadsheets in much of Europe write semicolons


class Entry(NamedTuple):
    """A picture, its caption, where that comes from, how often it is seen in an epoch, and the
    folder that says so."""

    picture: Path
    caption: Caption
    source: str
    repeats: int
    folder: Path


class Layout(NamedTuple):
    """The pictures in natural order, what was left out with the reasons, and remarks on metadata
    files."""

    entries: list[Entry]
    problems: dict[Path, str]
    remarks: list[tuple[Path, str]]


def read_layout(folder: Path, extension: str | None = None, repeats: int = 1) -> Layout:
    """Find every picture below a folder with its caption and repeats.

    A caption comes from the metadata file (folders.NAMES) of the picture's folder or the nearest
    above that names the picture; else from the file of the same stem (extension alone where it is
    given, else .txt, then .caption); else from the name of kohya's folder 10_name; else from the
    picture's name. Below a metadata file a picture that is not named there and has no caption file
    is left out, as imagefolder does.

    repeats is a factor for all of them, on top of the number of the nearest folder 10_name below
    the one given.
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
        row = metadata.rows and metadata.rows.get(picture)
        if row and row.caption:
            remark = (
                caption_file(picture, extension),
                f"says something else than {row.file.name}, which counts",
            )
            caption = Caption(
                row.caption, True, remark if beside.found and beside.text != row.caption else None
            )
            source = f"from {row.file.name}"
        elif beside.found:
            caption, source = beside, sys.intern(f"from {beside.suffix} files")
        elif not row and (reason := metadata.reason_against(picture)):
            problems[picture] = reason
            continue
        elif kohya_folder and (words := tidy(kohya_folder.name.partition("_")[2])):
            remark = beside.remark and (
                beside.remark[0],
                beside.remark[1].replace("picture's name", "folder's name"),
            )
            caption, source = Caption(words, False, remark), FROM_FOLDER_NAME
        else:
            caption, source = beside, FROM_FILE_NAME
        entries.append(
            Entry(picture, caption, source, repeats * (number or 1), kohya_folder or folder)
        )
    return Layout(entries, problems | metadata.missing, metadata.remarks)


def _kohya_folder(folder: Path, place: Path) -> tuple[int | None, Path | None]:
    """The number and the path of the nearest 10_name from a picture's place up to the folder,
    itself not counted."""
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
    """The metadata files of a folder: rows by picture, pictures that are named but missing, remarks
    on the rest."""

    def __init__(self, folder: Path, pictures: Sequence[Path]):
        self.folder = folder
        self.rows: dict[Path, _Named] = {}
        self.missing: dict[Path, str] = {}
        self.refused: dict[Path, str] = {}
        self.remarks: list[tuple[Path, str]] = []
        self._covered: dict[Path, Path] = {}  # folder: its first metadata file
        self._pictures = pictures
        self._root = os.path.realpath(folder)
        places = {picture.parent for picture in pictures}
        folders = {
            parent for place in places for parent in (place, *place.parents) if self._is_in(parent)
        }
        for each in sorted(
            {folder, *folders}, key=lambda path: (-len(path.parts), path)
        ):  # the nearest one counts
            for name in NAMES:
                if os.path.lexists(each / name):
                    self._read(each / name)

    @cached_property
    def _known(self) -> dict[str, Path]:
        """The pictures by name, for those who have a metadata file."""
        return {
            unicodedata.normalize("NFC", picture.as_posix()): picture for picture in self._pictures
        }

    def _is_in(self, path: Path) -> bool:
        return path == self.folder or self.folder in path.parents

    def _read(self, path: Path) -> None:
        found = read_metadata(path)
        if found.rows is not None:
            self._covered.setdefault(path.parent, path)
        count = 0
        for count, remark in enumerate(
            chain(found.remarks, self._take(path, found.rows or [])), start=1
        ):
            if count <= MOST_REMARKS:
                self.remarks.append((path, remark))
        if count > MOST_REMARKS:
            self.remarks.append((path, f"and {count - MOST_REMARKS} lines more"))

    def _take(self, path: Path, rows: Iterable[Row]) -> Iterator[str]:
        """Keep the rows that name a picture; says what is wrong with the others."""
        for row in rows:
            inner = inner_path(row.file_name)
            shown = (
                row.file_name[:100].encode("utf-8", "backslashreplace").decode("utf-8")
            )  # JSON can hold surrogates
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
                self.refused[picture] = (
                    f"a link out of the folder, which {path.name} may not name (line {row.line})"
                )
            elif (earlier := self.rows.get(picture)) and earlier.file == path:
                yield f"line {row.line}: {shown} was named in line {earlier.line} already, which counts"
            elif not earlier:
                self.rows[picture] = _Named(path, row.line, row.caption)
                if not row.caption:
                    yield f"line {row.line}: no caption for {shown}"

    def reason_against(self, picture: Path) -> str | None:
        """Why a picture without a caption file is left out: a metadata file at it or above does not
        name it."""
        if picture in self.refused:
            return self.refused[picture]
        file = next(
            (self._covered[parent] for parent in picture.parents if parent in self._covered), None
        )
        return file and f"{file.name} does not name it, and it has no caption file of its own"


def describe(sources: Iterable[str]) -> str:
    """How many captions come from where: 20 from .txt files, 4 from metadata.jsonl."""
    return ", ".join(f"{count} {source}" for source, count in Counter(sources).most_common())


class Row(NamedTuple):
    """A line of a metadata file: its number from 1, the path that it names, "" where it says no
    caption."""

    line: int
    file_name: str
    caption: str


class Metadata(NamedTuple):
    """What a metadata file says, in its order, and remarks on what could not be read in it.

    rows is None where the file is not one of imagefolder's.
    """

    rows: list[Row] | None
    remarks: list[str]


def read_metadata(path: Path) -> Metadata:
    """Read one of NAMES; a line that cannot be read costs itself and is told of by its number.

    UTF-8 is usual, other encodings are guessed as those of caption files are (captions.decode). A
    file that is a pipe, a device or larger than LARGEST is not opened.
    """
    try:
        text, guess = decode(content_of(path, LARGEST))
    except OSError as error:
        return Metadata(None, [f"cannot be read ({error.strerror or error})"])
    remarks = (
        [f"is not UTF-8 and was read as {guess}: save it as UTF-8 if that is wrong"]
        if guess
        else []
    )
    parsed = parse_jsonl(text) if path.suffix == ".jsonl" else parse_csv(text)
    return Metadata(parsed.rows, remarks + parsed.remarks)


def parse_jsonl(text: str) -> Metadata:
    """One JSON object a line with file_name and text or caption. Blank lines count as lines and say
    nothing."""
    found = _Found()
    for number, line in enumerate(
        text.split("\n"), start=1
    ):  # splitlines would cut at marks that JSON allows in text
        if not line.strip():
            continue
        try:
            fields = json.loads(line) if len(line) <= LARGEST_LINE else None
        except (ValueError, RecursionError):  # the latter: thousands of brackets
            fields = None
        if not found.take(number, fields, "not a JSON object"):
            break
    return Metadata(found.rows or None, found.remarks)


def parse_csv(text: str) -> Metadata:
    """A head with file_name and text or caption, then a row a picture; commas, semicolons or tabs
    between them."""
    lines = (
        text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").rstrip("\n").split("\n")
    )
    rows = _csv_rows(lines, max(DELIMITERS, key=lines[0].count))
    columns = [column.strip() for column in next(rows)[1] or []]
    if "file_name" not in columns:
        return Metadata(None, ["has no column file_name in its first line: it is not used"])
    found = _Found()
    for number, values in rows:
        fields = None if values is None else dict(zip(columns, values, strict=False))
        if values != [] and not found.take(
            number, fields, "not CSV, such as a quotation mark too many or too few"
        ):
            break
    return Metadata(found.rows, found.remarks)


def _csv_rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str] | None]]:
    """The number of each row's first line and its values, None for one that is no CSV."""
    start = wasted = 0
    while start < len(lines) and wasted <= 4 * len(
        lines
    ):  # each line could begin a row that fails at the file's end
        reader = csv.reader(
            (f"{lines[place]}\n" for place in range(start, len(lines))),
            delimiter=delimiter,
            strict=True,
        )
        number = start + 1
        try:
            for values in reader:
                yield number, values
                number = start + reader.line_num + 1
            return
        except csv.Error:
            yield number, None
            wasted += start + reader.line_num - number
            # behind the bad line: a quotation mark that is not closed would swallow the others
            start = number


class _Found:
    """Rows and remarks as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.remarks: list[str] = []

    def take(self, number: int, fields: Any, otherwise: str) -> bool:
        """Keep the row that the fields make, or say what they are instead; False to give the file
        up."""
        name = fields.get("file_name") if isinstance(fields, dict) else None
        if isinstance(name, str) and name.strip():
            said = (
                tidy(value) for key in CAPTION_KEYS if isinstance(value := fields.get(key), str)
            )
            self.rows.append(Row(number, name.strip(), next(filter(None, said), "")))
            return True
        self.remarks.append(
            f"line {number}: {'no file_name' if isinstance(fields, dict) else otherwise}"
        )
        if len(self.remarks) == MOST_BAD:
            self.remarks.append(
                f"line {number}: the {MOST_BAD}th that cannot be used; the rest is not read"
            )
        return len(self.remarks) < MOST_BAD


def inner_path(file_name: str) -> PurePosixPath | None:
    """A row's path with / or \\ between its parts, relative to the metadata file's folder; None
    where it leaves it."""
    if re.match(r"[A-Za-z]:|[/\\]", file_name):
        return None
    parts = [part for part in re.split(r"[/\\]", file_name) if part not in ("", ".")]
    return None if ".." in parts or not parts else PurePosixPath(*parts)

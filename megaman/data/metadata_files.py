"""metadata.jsonl and metadata.csv: the captions of many images in one file, as Hugging Face's
imagefolder defines them, and as people write them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megaman.data.captions import UnknownEncodingError, decode, read_small_file, tidy
from megaman.data.csv_table import read_table
from megaman.data.image_files import SUFFIXES
from megaman.data.legacy_encodings import encoding_warning

NAMES = ("metadata.jsonl", "metadata.csv")  # if both name an image, the first counts
# Reported, so that nobody expects them to be read; the last are those of kohya's scripts.
OTHER_NAMES = re.compile(
    r"metadata\.(csv|jsonl|json|tsv|xlsx?|ods|parquet)|meta_\w+\.json", re.IGNORECASE
)
# Names of keys and columns without spaces, hyphens and underscores; the first that is there counts.
FILE_KEYS = (
    "filename",
    "image",
    "img",
    "imagefile",
    "imagename",
    "imagepath",
    "filepath",
    "path",
    "file",
)
# The first one with text counts; other keys are allowed and ignored.
CAPTION_KEYS = ("text", "caption", "prompt", "description", "captiontext", "imagecaption", "tags")
MAX_FILE_SIZE = 8 * 2**20  # bytes: about 50,000 captions
# Lines that cannot be read before a file is given up: it is something else.
MAX_BAD_LINES = 1000


class Row(NamedTuple):
    """A line of a metadata file: its number from 1, the path that it names, its caption, "" if it
    has none, and why the caption is not certain, "" if it is."""

    line: int
    file_name: str
    caption: str
    problem: str = ""


class Metadata(NamedTuple):
    """The rows of a metadata file in order, and warnings about what could not be read in it.

    rows is None if the file is not understood: it names no images, or has no captions for them.
    has_bad_lines: whether some of its lines could not be read.
    """

    rows: list[Row] | None
    warnings: list[str]
    has_bad_lines: bool = False


def find_unread(folder: Path) -> list[Path]:
    """Files in a folder that somebody may take for its metadata file, but which are not read."""
    try:
        names = sorted(filter(OTHER_NAMES.fullmatch, os.listdir(folder)))
    except OSError:
        return []
    # Where upper and lower case are the same, METADATA.CSV is read.
    read = [name for name in NAMES if (folder / name).exists()]
    return [folder / name for name in names if name.lower() not in read]


def read_metadata(path: Path) -> Metadata:
    """Read one of NAMES; a line that cannot be read is reported by its number and costs only
    itself.

    UTF-8 is usual, other encodings are guessed as those of caption files (`captions.decode`). A
    file that is a pipe, a device or larger than MAX_FILE_SIZE is not opened.
    """
    try:
        text, guessed_encoding = decode(read_small_file(path, MAX_FILE_SIZE))
    except OSError as error:
        return Metadata(None, [f"cannot be read ({error.strerror or error})"])
    except UnknownEncodingError as error:
        return Metadata(None, [str(error)])
    warnings = [encoding_warning(guessed_encoding)] if guessed_encoding else []
    parsed = parse_jsonl(text) if path.suffix == ".jsonl" else parse_csv(text)
    return parsed._replace(warnings=warnings + parsed.warnings)


def parse_jsonl(text: str) -> Metadata:
    """One JSON object per line with file_name and text or caption; or pretty-printed objects, a
    list of them, or one object with captions by file name."""
    collector = _RowCollector()
    for number, value in _json_values(text):
        if isinstance(value, dict):
            for fields in _entries(value):
                if not collector.add_fields(number, fields):
                    return collector.metadata()
        elif not collector.add_problem(number, "not a JSON object"):
            break
    return collector.metadata()


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """The values in a text, each with the number of its first line; None for a line that is no
    JSON. Brackets and commas around the values are ignored."""
    decoder, position, line, counted = json.JSONDecoder(), 0, 1, 0
    separators = re.compile(r"[\s,\[\]\ufeff]*")
    while match := separators.match(text, position):
        for empty in re.finditer(r"\[\s*\]", match[0]):
            yield line + text.count("\n", counted, match.start() + empty.start()), None
        position = match.end()
        if position == len(text):
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # the latter: thousands of brackets
            value = None
            position = _end_of_line(text, position)
        yield line, value


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _entries(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in a JSON object: itself; or those of a list in it; or captions by file name."""
    if _first(value, FILE_KEYS) is not None:
        return [value]
    for part in value.values():
        if isinstance(part, list) and part and all(isinstance(item, dict) for item in part):
            return part
    if value and all(Path(key).suffix.lower() in SUFFIXES for key in value):
        return [
            {"file_name": name, **(part if isinstance(part, dict) else {"text": part})}
            for name, part in value.items()
        ]
    return [value]


def parse_csv(text: str) -> Metadata:
    """A header with file_name and text or caption, then one row per image, separated by commas,
    semicolons, tabs or bars (`csv_table.read_table`)."""
    collector = _RowCollector()
    table = read_table(text, FILE_KEYS, CAPTION_KEYS)
    if table is None:
        problem = "has no column file_name, or none named text, in its first line: it is not used"
        return Metadata(None, [problem])
    for row in table:
        if row.name:
            added = collector.add(Row(row.line, row.name, tidy(row.caption), row.problem))
        else:
            added = collector.add_problem(row.line, row.problem or "no file_name")
        if not added:
            break
    return collector.metadata(has_captions=True)


def _first(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of these keys that is there, however it is spelled."""
    by_key = {normalize_key(key): value for key, value in fields.items()}
    return next((by_key[key] for key in keys if by_key.get(key) is not None), None)


def normalize_key(key: str) -> str:
    """A key or column without what differs from one program to the next."""
    return re.sub(r"[\s_-]", "", key).casefold()


class _RowCollector:
    """Rows and warnings of a file that is being read."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._warnings: list[str] = []
        self._has_captions = False

    def add_fields(self, number: int, fields: dict[str, Any]) -> bool:
        """Add the row that a JSON object makes, or a warning; returns False if the file should be
        given up."""
        name = _first(fields, FILE_KEYS)
        if not isinstance(name, str) or not name.strip():
            return self.add_problem(number, "no file_name")
        has_caption = any(normalize_key(key) in CAPTION_KEYS for key in fields)
        self._has_captions = self._has_captions or has_caption
        caption, problem = _caption_in(fields)
        return self.add(Row(number, name.strip(), caption, problem))

    def add(self, row: Row) -> bool:
        """Add a row; always True."""
        self._rows.append(row)
        return True

    def add_problem(self, number: int, problem: str) -> bool:
        """Add a warning about a line; returns False if the file should be given up."""
        self._warnings.append(f"line {number}: {problem}")
        if len(self._warnings) == MAX_BAD_LINES:
            self._warnings.append(
                f"line {number}: the {MAX_BAD_LINES}th that cannot be used; the rest is not read"
            )
        return len(self._warnings) < MAX_BAD_LINES

    def metadata(self, has_captions: bool = False) -> Metadata:
        """What was collected."""
        if self._rows and not (has_captions or self._has_captions):
            return Metadata(None, [*self._warnings, "has neither text nor caption in any line"])
        return Metadata(self._rows or None, self._warnings, bool(self._warnings))


def _caption_in(fields: dict[str, Any]) -> tuple[str, str]:
    """The first of CAPTION_KEYS that holds text, on one line, "" if none does; and what is wrong if
    one holds something else."""
    by_key = {normalize_key(key): value for key, value in fields.items()}
    problem = ""
    for key in CAPTION_KEYS:
        value = by_key.get(key)
        if key == "tags" and isinstance(value, list):
            value = ", ".join(map(str, value))
        if isinstance(value, str) and (caption := tidy(value)):
            return caption, ""
        if value is not None and not isinstance(value, str):
            problem = problem or f"its {key} is no text"
    return "", problem


def inner_path(file_name: str) -> PurePosixPath | None:
    """A row's path, with / or \\ between its parts, relative to the metadata file's folder; None if
    it leads out of it."""
    if re.match(r"[A-Za-z]:|[/\\]", file_name):
        return None
    parts = [part for part in re.split(r"[/\\]", file_name) if part not in ("", ".")]
    return None if ".." in parts or not parts else PurePosixPath(*parts)

"""metadata.jsonl and metadata.csv: the captions of many images in one file, as Hugging Face's
imagefolder defines them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megaman.data.captions import decode, encoding_warning, read_small_file, tidy

NAMES = ("metadata.jsonl", "metadata.csv")  # if both name an image, the first counts
# The first column with text counts; other columns are allowed and ignored.
CAPTION_KEYS = ("text", "caption")
MAX_FILE_SIZE = 8 * 2**20  # bytes: about 50,000 captions
MAX_LINE_LENGTH = 2**20  # characters
# Lines that cannot be read before a file is given up: it is something else.
MAX_BAD_LINES = 1000
DELIMITERS = ",;\t"  # spreadsheets in much of Europe write semicolons
NOT_CSV = "not CSV, such as a quotation mark too many or too few"


class Row(NamedTuple):
    """A line of a metadata file: its number from 1, the path that it names, and its caption, "" if
    it has none."""

    line: int
    file_name: str
    caption: str


class Metadata(NamedTuple):
    """The rows of a metadata file in order, and warnings about what could not be read in it.

    rows is None if the file is not one of imagefolder's.
    """

    rows: list[Row] | None
    warnings: list[str]


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
    warnings = [encoding_warning(guessed_encoding)] if guessed_encoding else []
    parsed = parse_jsonl(text) if path.suffix == ".jsonl" else parse_csv(text)
    return Metadata(parsed.rows, warnings + parsed.warnings)


def parse_jsonl(text: str) -> Metadata:
    """One JSON object per line with file_name and text or caption. Blank lines are counted and
    ignored."""
    collector = _RowCollector()
    # Not splitlines, which would split at characters that JSON allows in text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line) if len(line) <= MAX_LINE_LENGTH else None
        except (ValueError, RecursionError):  # the latter: thousands of brackets
            fields = None
        if not collector.add(number, fields, "not a JSON object"):
            break
    return Metadata(collector.rows or None, collector.warnings)


def parse_csv(text: str) -> Metadata:
    """A header with file_name and text or caption, then one row per image, separated by commas,
    semicolons or tabs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    lines = text.rstrip("\n").split("\n")
    rows = _csv_rows(lines, max(DELIMITERS, key=lines[0].count))
    _, header = next(rows)
    columns = [column.strip() for column in header or []]
    if "file_name" not in columns:
        return Metadata(None, ["has no column file_name in its first line: it is not used"])
    collector = _RowCollector()
    for number, values in rows:
        if values == []:
            continue
        fields = None if values is None else dict(zip(columns, values, strict=False))
        if not collector.add(number, fields, NOT_CSV):
            break
    return Metadata(collector.rows, collector.warnings)


def _csv_rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str] | None]]:
    """The number of each row's first line and its values, None if it is not CSV."""
    start = wasted = 0
    # Every line could begin a row that fails only at the end of the file: this bounds the time.
    while start < len(lines) and wasted <= 4 * len(lines):
        rest = (f"{lines[i]}\n" for i in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        number = start + 1
        try:
            for values in reader:
                yield number, values
                number = start + reader.line_num + 1
            return
        except csv.Error:
            yield number, None
            wasted += start + reader.line_num - number
            # Go on after the bad line: an open quotation mark would swallow the others.
            start = number


class _RowCollector:
    """Rows and warnings of a file that is being read."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.warnings: list[str] = []

    def add(self, number: int, fields: Any, problem: str) -> bool:
        """Add the row that the fields make, or a warning; returns False if the file should be given
        up.

        fields is a dict for a row; for anything else, problem says what is wrong.
        """
        name = fields.get("file_name") if isinstance(fields, dict) else None
        if isinstance(name, str) and name.strip():
            self.rows.append(Row(number, name.strip(), _caption_in(fields)))
            return True
        reason = "no file_name" if isinstance(fields, dict) else problem
        self.warnings.append(f"line {number}: {reason}")
        if len(self.warnings) == MAX_BAD_LINES:
            self.warnings.append(
                f"line {number}: the {MAX_BAD_LINES}th that cannot be used; the rest is not read"
            )
        return len(self.warnings) < MAX_BAD_LINES


def _caption_in(fields: dict[str, Any]) -> str:
    """The first of CAPTION_KEYS that holds text, on one line; "" if none does."""
    for key in CAPTION_KEYS:
        value = fields.get(key)
        if isinstance(value, str) and (caption := tidy(value)):
            return caption
    return ""


def inner_path(file_name: str) -> PurePosixPath | None:
    """A row's path, with / or \\ between its parts, relative to the metadata file's folder; None if
    it leads out of it."""
    if re.match(r"[A-Za-z]:|[/\\]", file_name):
        return None
    parts = [part for part in re.split(r"[/\\]", file_name) if part not in ("", ".")]
    return None if ".." in parts or not parts else PurePosixPath(*parts)

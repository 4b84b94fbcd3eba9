"""metadata.jsonl and metadata.csv: captions of many pictures in one file, as Hugging Face's imagefolder has them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megaman.captions import content_of, decode, tidy

NAMES = ("metadata.jsonl", "metadata.csv")  # where both name a picture, the first counts
CAPTION_KEYS = ("text", "caption")  # the first that says something counts; other columns are allowed and not read
LARGEST = 8 * 2**20  # bytes: about 50,000 captions
LARGEST_LINE = 2**20  # characters
MOST_BAD = 1000  # lines that cannot be read, before a file is given up: it is something else
DELIMITERS = ",;\t"  # spreadsheets in much of Europe write semicolons


class Row(NamedTuple):
    """A line of a metadata file: its number from 1, the path that it names, "" where it says no caption."""

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

    UTF-8 is usual, other encodings are guessed as those of caption files are (captions.decode). A file that is a pipe,
    a device or larger than LARGEST is not opened.
    """
    try:
        text, guess = decode(content_of(path, LARGEST))
    except OSError as error:
        return Metadata(None, [f"cannot be read ({error.strerror or error})"])
    remarks = [f"is not UTF-8 and was read as {guess}: save it as UTF-8 if that is wrong"] if guess else []
    parsed = parse_jsonl(text) if path.suffix == ".jsonl" else parse_csv(text)
    return Metadata(parsed.rows, remarks + parsed.remarks)


def parse_jsonl(text: str) -> Metadata:
    """One JSON object a line with file_name and text or caption. Blank lines count as lines and say nothing."""
    found = _Found()
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at marks that JSON allows in text
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
    """A head with file_name and text or caption, then a row a picture; commas, semicolons or tabs between them."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").rstrip("\n").split("\n")
    rows = _csv_rows(lines, max(DELIMITERS, key=lines[0].count))
    columns = [column.strip() for column in next(rows)[1] or []]
    if "file_name" not in columns:
        return Metadata(None, ["has no column file_name in its first line: it is not used"])
    found = _Found()
    for number, values in rows:
        fields = None if values is None else dict(zip(columns, values, strict=False))
        if values != [] and not found.take(number, fields, "not CSV, such as a quotation mark too many or too few"):
            break
    return Metadata(found.rows, found.remarks)


def _csv_rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str] | None]]:
    """The number of each row's first line and its values, None for one that is no CSV."""
    start = wasted = 0
    while start < len(lines) and wasted <= 4 * len(lines):  # each line could begin a row that fails at the file's end
        reader = csv.reader(
            (f"{lines[place]}\n" for place in range(start, len(lines))), delimiter=delimiter, strict=True
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
            start = number  # behind the bad line: a quotation mark that is not closed would swallow the others


class _Found:
    """Rows and remarks as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.remarks: list[str] = []

    def take(self, number: int, fields: Any, otherwise: str) -> bool:
        """Keep the row that the fields make, or say what they are instead; False to give the file up."""
        name = fields.get("file_name") if isinstance(fields, dict) else None
        if isinstance(name, str) and name.strip():
            said = (tidy(value) for key in CAPTION_KEYS if isinstance(value := fields.get(key), str))
            self.rows.append(Row(number, name.strip(), next(filter(None, said), "")))
            return True
        self.remarks.append(f"line {number}: {'no file_name' if isinstance(fields, dict) else otherwise}")
        if len(self.remarks) == MOST_BAD:
            self.remarks.append(f"line {number}: the {MOST_BAD}th that cannot be used; the rest is not read")
        return len(self.remarks) < MOST_BAD


def inner_path(file_name: str) -> PurePosixPath | None:
    """A row's path with / or \\ between its parts, relative to the metadata file's folder; None where it leaves it."""
    if re.match(r"[A-Za-z]:|[/\\]", file_name):
        return None
    parts = [part for part in re.split(r"[/\\]", file_name) if part not in ("", ".")]
    return None if ".." in parts or not parts else PurePosixPath(*parts)

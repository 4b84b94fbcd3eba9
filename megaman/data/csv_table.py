"""Tables of captions as people write them: commas without quotation marks around the caption,
other delimiters, other quotation marks, further columns.

A row is put right if that is certain, and otherwise reported.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megaman.data.image_files import SUFFIXES

DELIMITERS = ",;\t|"  # spreadsheets in much of Europe write semicolons
NOT_CSV = "not CSV, such as a quotation mark too many or too few"
TOO_MANY = "more values than columns: put quotation marks around the caption"
TOO_FEW = "fewer values than columns, and no caption"
SPLIT = "a space behind a comma: put quotation marks around the caption"
# Word processors turn straight quotation marks into these, which CSV does not know.
CURLY_QUOTES = ("“”", "„“", "””", "‘’", "«»", "「」")
QUOTES = ('""', "''", *CURLY_QUOTES)
NUMBER = re.compile(r"\s*[-+]?[\d.]*\s*")


class TableRow(NamedTuple):
    """The number of a row's first line, the image that it names, its caption, and why the row is
    not certain; no name if it is unknown."""

    line: int
    name: str
    caption: str
    problem: str = ""


class _Table(NamedTuple):
    """How a table is written: its columns, normalized, and where name and captions stand."""

    columns: list[str]
    delimiter: str
    is_tight: bool  # no space behind the delimiters of the header
    name: int
    captions: list[int]


def read_table(
    text: str, file_keys: Sequence[str], caption_keys: Sequence[str]
) -> Iterator[TableRow] | None:
    """The rows of a table with such columns, normalized as in metadata_files.normalize_key; None if
    it has none. Without a header, a first line that begins with an image's name is a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    lines = text.rstrip("\n").split("\n")
    blank = next((number for number, line in enumerate(lines) if line.strip()), 0)
    separator = re.fullmatch(r"sep=(.)", lines[blank].strip())  # for Excel
    first = blank + 1 if separator and len(lines) > blank + 1 else blank
    delimiter = separator[1] if separator else max(DELIMITERS, key=lines[first].count)
    header = _values(lines[first], delimiter) or []
    while header and not header[-1].strip():
        header.pop()
    columns = [re.sub(r"[\s_-]", "", _unquote(column)).casefold() for column in header]
    start = first + 1
    if len(header) > 1 and _is_image_name(_unquote(header[0])):
        columns, start = [file_keys[0], caption_keys[0]], first
    name = next((columns.index(key) for key in file_keys if key in columns), None)
    captions = [columns.index(key) for key in caption_keys if key in columns]
    if name is None or not captions:
        return None
    is_tight = not re.search(rf"{re.escape(delimiter)}\s", lines[first].strip())
    return _rows(lines, start, _Table(columns, delimiter, is_tight, name, captions))


def _rows(lines: list[str], start: int, table: _Table) -> Iterator[TableRow]:
    for number, end, values in _csv_rows(lines, start, table):
        if values == [] or (values is not None and not any(map(str.strip, values))):
            continue
        line = lines[number - 1] if end == number else None
        yield _row(number, values, line, table)


def _csv_rows(
    lines: list[str], start: int, table: _Table
) -> Iterator[tuple[int, int, list[str] | None]]:
    """The numbers of each row's first and last line and its values, None if it is not CSV."""
    wasted = 0
    # Every line could begin a row that fails only at the end of the file: this bounds the time.
    while start < len(lines) and wasted <= 4 * len(lines):
        rest = (f"{lines[i]}\n" for i in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=table.delimiter, strict=True)
        number = start + 1
        try:
            for values in reader:
                end = start + reader.line_num
                if any(_begins_row(lines[i], table) for i in range(number, end)):
                    raise csv.Error("an open quotation mark swallowed the next row")
                yield number, end, values
                number = end + 1
            return
        except csv.Error:
            yield number, number, None
            wasted += start + reader.line_num - number
            # Go on after the bad line: an open quotation mark would swallow the others.
            start = number


def _begins_row(line: str, table: _Table) -> bool:
    """Whether a line within quotation marks looks like a row of its own."""
    first, delimiter, _ = line.partition(table.delimiter)
    return table.name == 0 and bool(delimiter) and _is_image_name(_unquote(first))


def _row(number: int, values: list[str] | None, line: str | None, table: _Table) -> TableRow:
    """A row from its values, None if they are not CSV; line is the raw line, None if it has several
    lines."""
    fitted, problem = _fit(values, line, table)
    if fitted is None:
        shown = (values or (line or "").split(table.delimiter))[table.name : table.name + 1]
        name = _unquote(shown[0]) if shown and len(table.columns) > 1 else ""
        is_known = table.name == 0 and values is not None and _is_image_name(name)
        return TableRow(number, name if is_known else "", "", problem)
    captions = [_unquote(fitted[i], CURLY_QUOTES) for i in table.captions if i < len(fitted)]
    name = _unquote(fitted[table.name], CURLY_QUOTES) if table.name < len(fitted) else ""
    return TableRow(number, name, next(filter(None, captions), ""))


def _fit(values: list[str] | None, line: str | None, table: _Table) -> tuple[list[str] | None, str]:
    """The values, as many as there are columns or fewer; or None and what is wrong."""
    if values is None:
        return _fit_quotes(line, table), NOT_CSV
    count = len(table.columns)
    while len(values) > count and not values[-1].strip():
        values.pop()
    if len(values) <= count:
        values = _without_spaces(values, line, table)
    if len(values) <= count and not _is_split(values, table):
        return (values, "") if min(table.captions) < len(values) else (None, TOO_FEW)
    if len(values) <= count:
        return None, SPLIT
    for again in _other_splits(line, table):
        if again is not None and len(again) == count:
            return again, ""
    return _join(values, table), TOO_MANY


def _fit_quotes(line: str | None, table: _Table) -> list[str] | None:
    """The values of a line whose quotation marks are not CSV's: escaped with a backslash, or part
    of a caption that does not begin with one. None if that is not certain."""
    if line is None or line.count('"') % 2:
        return None
    escaped = _values(line, table.delimiter, escapechar="\\", doublequote=False)
    if escaped and "\\" in line and len(escaped) == len(table.columns):
        return escaped
    values = line.split(table.delimiter)
    if len(table.columns) != 2 or table.name != 0 or len(values) < 2:
        return None
    return None if values[1].strip().startswith('"') else _join(values, table)


def _without_spaces(values: list[str], line: str | None, table: _Table) -> list[str]:
    """The values, read again if there are spaces before quotation marks."""
    if line is None or not re.search(rf'(^|{re.escape(table.delimiter)})\s+"', line):
        return values
    again = _values(line, table.delimiter, skipinitialspace=True)
    return again if again is not None and len(again) == len(values) else values


def _is_split(values: Sequence[str], table: _Table) -> bool:
    """Whether what stands behind the caption may be its end: it follows a space, unlike the caption
    itself and the header's columns."""
    if not table.is_tight or table.delimiter == "\t":
        return False
    caption = max(table.captions)
    if caption >= len(values) or values[caption].startswith(" "):
        return False
    return any(
        value.startswith(" ") and value.strip() and not NUMBER.fullmatch(value)
        for value in values[caption + 1 :]
    )


def _other_splits(line: str | None, table: _Table) -> Iterator[list[str] | None]:
    """A row's values if spaces before quotation marks do not count, and if a delimiter is one only
    without a space behind it."""
    if line is not None:
        yield _values(line, table.delimiter, skipinitialspace=True)
        if '"' not in line:
            tight = re.split(rf"{re.escape(table.delimiter)}(?!\s)", line)
            yield [_unquote(value) for value in tight]


def _join(values: Sequence[str], table: _Table) -> list[str] | None:
    """The values with all that is too much in the caption; None unless what is then in the other
    columns is an image's name and numbers."""
    if len(table.captions) > 1:
        return None
    caption, excess = table.captions[0], len(values) - len(table.columns)
    end = caption + max(excess, 0) + 1
    text = _unquote(table.delimiter.join(values[caption:end]))
    joined = [*values[:caption], text, *values[end:]]
    if not _is_image_name(_unquote(joined[table.name])):
        return None
    others = [value for i, value in enumerate(joined) if i not in (table.name, caption)]
    return joined if all(NUMBER.fullmatch(value) for value in others) else None


def _values(line: str, delimiter: str, **how: object) -> list[str] | None:
    """The values of one line; None if it is not CSV."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True, **how), [])  # pyright: ignore
    except csv.Error:
        return None


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(tuple(SUFFIXES))


def _unquote(value: str, quotes: Sequence[str] = QUOTES) -> str:
    """A value without spaces and quotation marks around it."""
    value = value.strip()
    for opening, closing in quotes:
        inner = value[1:-1]
        is_quoted = len(value) > 1 and value[0] == opening and value[-1] == closing
        if is_quoted and not {opening, closing} & set(inner.replace('""', "")):
            return inner.replace('""', '"').strip()
    return value

"""What is known of a file, valid as long as its size and time of change are the same: bytes are
read once, not again.

One SQLite table under the cache's folder, which several runs may read and write at once. All that
it holds can be found out anew, so a table that cannot be used costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from megaman.files import Stamp

NAME = "seen.sqlite"
PATIENCE = 30  # seconds that a run waits while another one writes


class Stamps:
    """The table in a folder; with None, or where it cannot be opened, one that knows nothing and
    keeps nothing."""

    def __init__(self, folder: Path | None):
        self._table: sqlite3.Connection | None = None
        if folder is None:
            return
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                self._table = _open(folder / NAME)
                return
            except (
                sqlite3.OperationalError
            ):  # no right to write there, or a file system without locks
                return
            except sqlite3.DatabaseError:  # damaged, which the next attempt puts right
                with contextlib.suppress(OSError):
                    (folder / NAME).unlink()

    def told(self, path: Path, stamp: Stamp) -> str | None:
        """What was noted of a file that has this stamp."""
        with contextlib.suppress(sqlite3.Error):
            query = "SELECT told FROM seen WHERE path = ? AND size = ? AND changed = ?"
            row = self._table and self._table.execute(query, (_key(path), *stamp)).fetchone()
            return row[0] if row else None
        return None

    def note(self, entries: Iterable[tuple[Path, Stamp, str]]) -> None:
        """Keep what was found out of files with these stamps, in place of what was known of
        them."""
        rows = [(_key(path), *stamp, told) for path, stamp, told in entries]
        if self._table and rows:
            with contextlib.suppress(sqlite3.Error), self._table:
                self._table.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)", rows)


def _open(path: Path) -> sqlite3.Connection:
    table = sqlite3.connect(path, timeout=PATIENCE)
    with table:
        table.execute(
            "CREATE TABLE IF NOT EXISTS seen (path BLOB PRIMARY KEY, size INT, changed INT, told TEXT)"
        )
    return table


def _key(path: Path) -> bytes:
    return os.fsencode(os.path.abspath(path))  # as bytes: a name on Linux need not be Unicode

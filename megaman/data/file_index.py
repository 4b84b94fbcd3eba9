"""An index of facts about files, each valid as long as the file's size and modification time are
unchanged, so that a file's bytes are read once and not at every start.

One SQLite table in the cache folder, which several runs may read and write at the same time.
Everything in it can be recomputed, so a table that cannot be used costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from megaman.files import Stamp

NAME = "seen.sqlite"
TIMEOUT = 30  # seconds to wait while another run writes


class FileIndex:
    """The table in a folder. Without a folder, or if the table cannot be opened, the index stays
    empty."""

    def __init__(self, folder: Path | None):
        self._table = _open_or_replace(folder) if folder else None

    def get(self, path: Path, stamp: Stamp, topic: str = "") -> str | None:
        """The fact of a topic stored for a file, or None if there is none or the stamp differs."""
        if self._table is None:
            return None
        with contextlib.suppress(sqlite3.Error):
            query = "SELECT told FROM seen WHERE path = ? AND size = ? AND changed = ?"
            row = self._table.execute(query, (_key(path, topic), *stamp)).fetchone()
            return row[0] if row else None
        return None

    def update(self, entries: Iterable[tuple[Path, Stamp, str]], topic: str = "") -> None:
        """Store a fact for each of these files with these stamps, replacing older facts of the
        topic."""
        rows = [(_key(path, topic), *stamp, fact) for path, stamp, fact in entries]
        if self._table is not None and rows:
            with contextlib.suppress(sqlite3.Error), self._table:
                self._table.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)", rows)


def _open_or_replace(folder: Path) -> sqlite3.Connection | None:
    """The folder's table, created or recreated if needed; None if that is not possible."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            return _open(folder / NAME)
        except sqlite3.OperationalError:  # no write permission, or a file system without locks
            return None
        except sqlite3.DatabaseError:  # damaged: the second attempt starts a new one
            with contextlib.suppress(OSError):
                (folder / NAME).unlink()
    return None


def _open(path: Path) -> sqlite3.Connection:
    with contextlib.suppress(OSError):
        path.touch()  # SQLite itself would keep others from writing it, whatever the umask says
    table = sqlite3.connect(path, timeout=TIMEOUT)
    table.execute("PRAGMA synchronous = OFF")  # facts are added one by one, and can be lost
    with table:
        table.execute(
            "CREATE TABLE IF NOT EXISTS seen "
            "(path BLOB PRIMARY KEY, size INT, changed INT, told TEXT)"
        )
    return table


def _key(path: Path, topic: str) -> bytes:
    key = os.fsencode(os.path.abspath(path))  # as bytes: a name on Linux need not be Unicode
    return key + b"\0" + topic.encode() if topic else key

"""Files are recognized by path, size and modification time."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from megaman.data.file_index import NAME, FileIndex
from megaman.files import Stamp, digest_of, stamp_of


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(b"blue")
    return path


def test_a_fact_is_known_while_the_file_stays_as_it_is(file, tmp_path):
    index = FileIndex(tmp_path / "cache")
    stamp = stamp_of(file)
    assert index.get(file, stamp) is None
    index.update([(file, stamp, "first")])
    index.update([(file, stamp, "second")])
    assert FileIndex(tmp_path / "cache").get(file, stamp_of(file)) == "second", (
        "another run knows it too"
    )
    os.utime(file, ns=(stamp.changed, stamp.changed + 1))
    assert index.get(file, stamp_of(file)) is None, "touched"
    file.write_bytes(b"black")
    os.utime(file, ns=(stamp.changed, stamp.changed))
    assert index.get(file, stamp_of(file)) is None, "another size at the same time"


def test_a_path_is_known_from_wherever_it_is_named(file, tmp_path, monkeypatch):
    index = FileIndex(tmp_path / "cache")
    index.update([(file, stamp_of(file), "here")])
    monkeypatch.chdir(tmp_path)
    assert index.get(Path("picture.png"), stamp_of(file)) == "here"


def test_a_digest_is_of_the_bytes_alone(file, tmp_path):
    before = digest_of(file)
    assert digest_of(file.rename(tmp_path / "moved.png")) == before
    (tmp_path / "moved.png").write_bytes(b"bluf")
    assert digest_of(tmp_path / "moved.png") != before


@pytest.mark.parametrize(
    "content", [b"", b"no table at all" * 100, b"SQLite format 3\0" + bytes(4000)]
)
def test_a_damaged_table_is_begun_anew(file, tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    FileIndex(tmp_path).update([(file, stamp_of(file), "known")])
    assert FileIndex(tmp_path).get(file, stamp_of(file)) == "known"


def test_without_a_place_it_knows_nothing(file, tmp_path):
    (tmp_path / "file").touch()
    for index in (
        FileIndex(None),
        FileIndex(tmp_path / "file"),
        FileIndex(tmp_path / "file" / "below"),
    ):
        index.update([(file, stamp_of(file), "lost")])
        assert index.get(file, stamp_of(file)) is None


def test_names_that_are_not_unicode(tmp_path):
    index, path = FileIndex(tmp_path), Path(os.fsdecode(b"/nowhere/\x83\x8d.png"))
    index.update([(path, Stamp(1, 2), "known")])
    assert index.get(path, Stamp(1, 2)) == "known"


def test_several_write_at_once(tmp_path):
    def write(number: int) -> None:
        index = FileIndex(tmp_path)
        for turn in range(20):
            index.update(
                [(Path(f"/nowhere/{number}-{turn}"), Stamp(number, turn), f"{number} {turn}")]
            )

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = FileIndex(tmp_path)
    for number in range(4):
        for turn in range(20):
            assert (
                index.get(Path(f"/nowhere/{number}-{turn}"), Stamp(number, turn))
                == f"{number} {turn}"
            )
    with sqlite3.connect(tmp_path / NAME) as table:
        assert table.execute("PRAGMA integrity_check").fetchone() == ("ok",)

"""Files that are recognised by path, size and time of change."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from megaman.data.file_index import NAME, Stamps
from megaman.files import Stamp, digest_of, stamp_of


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(b"blue")
    return path


def test_what_was_noted_is_told_while_the_file_stays_as_it_is(file, tmp_path):
    seen = Stamps(tmp_path / "cache")
    stamp = stamp_of(file)
    assert seen.told(file, stamp) is None
    seen.note([(file, stamp, "first")])
    seen.note([(file, stamp, "second")])
    assert Stamps(tmp_path / "cache").told(file, stamp_of(file)) == "second", (
        "another run knows it too"
    )
    os.utime(file, ns=(stamp.changed, stamp.changed + 1))
    assert seen.told(file, stamp_of(file)) is None, "touched"
    file.write_bytes(b"black")
    os.utime(file, ns=(stamp.changed, stamp.changed))
    assert seen.told(file, stamp_of(file)) is None, "another size at the same time"


def test_a_path_is_told_from_wherever_it_is_named(file, tmp_path, monkeypatch):
    seen = Stamps(tmp_path / "cache")
    seen.note([(file, stamp_of(file), "here")])
    monkeypatch.chdir(tmp_path)
    assert seen.told(Path("picture.png"), stamp_of(file)) == "here"


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
    Stamps(tmp_path).note([(file, stamp_of(file), "known")])
    assert Stamps(tmp_path).told(file, stamp_of(file)) == "known"


def test_without_a_place_it_knows_nothing(file, tmp_path):
    (tmp_path / "file").touch()
    for seen in (Stamps(None), Stamps(tmp_path / "file"), Stamps(tmp_path / "file" / "below")):
        seen.note([(file, stamp_of(file), "lost")])
        assert seen.told(file, stamp_of(file)) is None


def test_names_that_are_not_unicode(tmp_path):
    seen, path = Stamps(tmp_path), Path(os.fsdecode(b"/nowhere/\x83\x8d.png"))
    seen.note([(path, Stamp(1, 2), "known")])
    assert seen.told(path, Stamp(1, 2)) == "known"


def test_several_write_at_once(tmp_path):
    def write(number: int) -> None:
        seen = Stamps(tmp_path)
        for turn in range(20):
            seen.note(
                [(Path(f"/nowhere/{number}-{turn}"), Stamp(number, turn), f"{number} {turn}")]
            )

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = Stamps(tmp_path)
    for number in range(4):
        for turn in range(20):
            assert (
                seen.told(Path(f"/nowhere/{number}-{turn}"), Stamp(number, turn))
                == f"{number} {turn}"
            )
    with sqlite3.connect(tmp_path / NAME) as table:
        assert table.execute("PRAGMA integrity_check").fetchone() == ("ok",)

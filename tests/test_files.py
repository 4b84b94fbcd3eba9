"""Nobody ever finds half a file, and what was there stays until the new one is whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman import files
from megaman.errors import UserError
from megaman.files import (
    ASIDE,
    make_folder,
    read_json,
    replacing,
    replacing_folder,
    write_json,
    write_text,
)


class Broken(Exception):
    """What goes wrong half-way."""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "first\nzwei 洛克人\n")
    assert path.read_bytes() == "first\nzwei 洛克人\n".encode(), "UTF-8 and \\n on every system"
    write_text(path, "second")
    assert path.read_text() == "second"
    assert names(path.parent) == ["a.txt"]


def test_nobody_sees_a_file_before_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("half")
        assert path.read_text() == "old"
        assert aside.parent == path.parent, "on the same disk, or it could not be renamed"
        assert aside.name.endswith(ASIDE)
        aside.write_text("whole")
    assert path.read_text() == "whole"


@pytest.mark.skipif(os.name != "posix", reason="Windows wants a right for links")
@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir"])
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    os.symlink("nowhere/here", "lost")
    os.symlink("loop", "loop")
    os.symlink("file", "linked")
    for folder, said in {
        "file": "file is no folder. Choose another folder",
        "linked": "linked is no folder. Choose another folder",
        "file/a/b": "file is no folder. Choose another folder",
        "lost": "lost is a link to nothing. Choose another folder",
        "lost/a": "lost is a link to nothing. Choose another folder",
        "loop": "loop is a link to nothing. Choose another folder",
    }.items():
        with pytest.raises(UserError) as refused:
            make_folder(Path(folder), flag)
        assert str(refused.value) == f"{flag} {folder} cannot be made: {said}"
    with pytest.raises(UserError, match=r"\(File name too long\). Choose a shorter name"):
        make_folder(Path("a" * 300), flag)
    make_folder(Path("new/folder"), flag)
    make_folder(Path("new/folder"), flag)
    assert sorted(os.listdir()) == ["file", "linked", "loop", "lost", "new"]


def test_a_failure_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(Broken), replacing(path) as aside:
        aside.write_text("ha")
        raise Broken
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failure_half_way_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(Broken), replacing(tmp_path / "a.txt") as aside:
        aside.write_text("ha")
        raise Broken
    assert names(tmp_path) == []


def test_content_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"kept": 1})
    with pytest.raises(TypeError):
        write_json(path, {"lost": object()})
    assert read_json(path) == {"kept": 1}
    assert names(tmp_path) == ["a.json"]


def filled(folder, content: str) -> None:
    with replacing_folder(folder) as aside:
        (aside / "a.txt").write_text(content)
        (aside / f"{content}.txt").write_text(content)


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "deep" / "lora_weights"
    filled(folder, "first")
    assert names(folder) == ["a.txt", "first.txt"]
    filled(folder, "second")
    assert names(folder) == ["a.txt", "second.txt"], "nothing of the former one stays"
    assert (folder / "a.txt").read_text() == "second"
    assert names(folder.parent) == ["lora_weights"]


def test_nobody_sees_a_folder_before_it_is_whole(tmp_path):
    folder = tmp_path / "checkpoint-2"
    with replacing_folder(folder) as aside:
        (aside / "a.txt").write_text("whole")
        assert not folder.exists()
        assert aside.name.endswith(ASIDE)
    assert names(folder) == ["a.txt"]


def test_a_failure_half_way_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "lora_weights"
    filled(folder, "old")
    with pytest.raises(Broken), replacing_folder(folder) as aside:
        (aside / "a.txt").write_text("half")
        raise Broken
    assert names(folder) == ["a.txt", "old.txt"] and (folder / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["lora_weights"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    """As on Windows, where a folder with an open file in it cannot be renamed."""
    folder = tmp_path / "lora_weights"
    filled(folder, "old")
    rename = os.replace

    def refuse_the_new_one(source, goal):
        if (source.is_dir() and (source / "new.txt").exists()) and goal == folder:
            raise PermissionError(13, "in use", str(goal))
        rename(source, goal)

    monkeypatch.setattr(os, "replace", refuse_the_new_one)
    with pytest.raises(PermissionError):
        filled(folder, "new")
    assert names(folder) == ["a.txt", "old.txt"]
    assert names(tmp_path) == ["lora_weights"]


@pytest.mark.parametrize("tries", [2, 99])
def test_windows_is_asked_again_while_a_virus_scanner_looks_into_the_file(
    tmp_path, monkeypatch, tries
):
    rename, refused = os.replace, []

    def refuse(source, target):
        refused.append(source)
        if len(refused) <= tries:
            raise PermissionError(13, "in use", str(target))
        rename(source, target)

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_text(tmp_path / "a.txt", "not elsewhere")
    assert len(refused) == 1
    refused.clear()
    monkeypatch.setattr(files, "WINDOWS", True)
    wait = pytest.raises(PermissionError) if tries > 2 else contextlib.nullcontext()
    with wait:
        write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert len(refused) == 3
    assert (tmp_path / "a.txt").read_text() == ("old" if tries > 2 else "new")
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_run_left_aside_is_in_nobodys_way(tmp_path):
    """In a container every run may have the same process id, and so the same names for what is
    aside."""
    folder = tmp_path / "checkpoint-2"
    for part in ("", ".former"):
        left = tmp_path / f"checkpoint-2.{os.getpid()}{part}{ASIDE}"
        left.mkdir()
        (left / "stale.txt").write_text("stale")
    (tmp_path / f"a.txt.{os.getpid()}{ASIDE}").write_text("a stale text that is longer")
    filled(folder, "first")
    filled(folder, "second")
    write_text(tmp_path / "a.txt", "new")
    assert names(folder) == ["a.txt", "second.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt", "checkpoint-2"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("aé洛", max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(JSON)
def test_json_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, content)
    assert read_json(path) == content


def test_json_keeps_words_legible_and_reads_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"prompt": "洛克人"})
    assert "洛克人" in path.read_text(encoding="utf-8")
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe{\x00}\x00", b"not json"])
def test_a_broken_json_file_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert "a.json is not valid JSON" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_json_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.json is missing"):
        read_json(tmp_path / "none.json")


def test_names_that_are_not_unicode_can_be_noted(tmp_path):
    write_json(tmp_path / "noted.json", {"data_dir": "pictures\udcff"})
    assert read_json(tmp_path / "noted.json") == {"data_dir": "pictures\udcff"}

"""Names that every system takes, and what lies inside what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.files import is_inside, path_within, refused_by_windows, safe_name, split_strength

ODD = [
    "con",
    "CON",
    "nul.txt",
    "aux ",
    "com1",
    "LPT³",
    "conout$",
    ".",
    "..",
    "",
    " ",
    "a.",
    "a:b",
    "a/b",
    "\\\\x",
    "\0",
    "\x1b",
    "x" * 300,
    "洛" * 300,
    '?*|<>"',
    "out",
]


@given(st.text() | st.sampled_from(ODD))
def test_a_safe_name_is_one_part_that_windows_takes(text):
    name = safe_name(text)
    assert name and refused_by_windows(name) is None
    assert name == Path(name).name and len(name.encode("utf-8", "surrogatepass")) <= 4 * 51
    assert safe_name(name) == name


def test_plain_names_stay():
    for name in ("megaman_lora_output", "Ausgabe für Rock", "洛克人", "v1.5", "console"):
        assert safe_name(name) == name


def test_what_windows_refuses():
    for path in ("con", "a/b/Prn.tar.gz", "x/nul ", "a ", "b.", "xy:z", "what?", "com¹"):
        assert refused_by_windows(path)
    for path in (
        "C:\\pictures\\x",
        "../../out",
        ".",
        "",
        "./.hidden",
        "company/x",
        "\\\\server\\share\\folder",
        "C:/",
    ):
        assert refused_by_windows(path) is None


def test_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    assert is_inside("logs/run", "logs") and is_inside("./logs/a/../run", tmp_path / "logs")
    for elsewhere in (
        "logs",
        "logs/..",
        "logs/../x",
        "logsx/run",
        "/",
        "",
        "a\0b",
        None,
        5,
        ["logs/run"],
        {},
    ):
        assert not is_inside(elsewhere, "logs")
    assert (
        path_within("logs", "logs") == "."
        and path_within("logs/a", "logs") == "a"
        and path_within("x", "logs") is None
    )


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "out").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not is_inside(str(tmp_path / "logs" / "out" / "x"), str(tmp_path / "logs"))
    assert is_inside(str(tmp_path / "loop" / "x"), str(tmp_path))


@pytest.mark.parametrize(
    ("word", "path", "strength"),
    [
        ("lora_weights", "lora_weights", 1.0),
        ("lora_weights:0.7", "lora_weights", 0.7),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a:.5", "a", 0.5),
        ("a:1:2", "a:1", 2.0),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1.0),
        ("C:\\loras\\a.safetensors:0.8", "C:\\loras\\a.safetensors", 0.8),
        ("C:/loras", "C:/loras", 1.0),
        ("a:", "a:", 1.0),
        ("a:nan", "a:nan", 1.0),
        ("a:1e3", "a:1e3", 1.0),
        (":1", ":1", 1.0),
    ],
)
def test_a_strength_stands_behind_the_last_colon(word, path, strength):
    assert split_strength(word) == (path, strength)


@pytest.mark.skipif(os.name == "nt", reason="Windows takes no colon in a name")
def test_a_file_that_is_really_named_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").mkdir()
    assert split_strength("a:2") == ("a:2", 1.0)
    assert split_strength("b:2") == ("b", 2.0)

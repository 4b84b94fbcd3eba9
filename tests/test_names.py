"""Names that every system takes, and what lies inside what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.names import below, is_inside, refused_by_windows, safe_name

ODD = ["con", "CON", "nul.txt", "aux ", "com1", "LPT³", "conout$", ".", "..", "", " ", "a.", "a:b", "a/b", "\\\\x",
       "\0", "\x1b", "x" * 300, "洛" * 300, "?*|<>\"", "out"]  # fmt: skip


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
    for path in ("C:\\pictures\\x", "../../out", ".", "", "./.hidden", "company/x", "\\\\server\\share\\folder", "C:/"):
        assert refused_by_windows(path) is None


def test_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    assert is_inside("logs/run", "logs") and is_inside("./logs/a/../run", tmp_path / "logs")
    for elsewhere in ("logs", "logs/..", "logs/../x", "logsx/run", "/", "", "a\0b", None, 5, ["logs/run"], {}):
        assert not is_inside(elsewhere, "logs")
    assert below("logs", "logs") == "." and below("logs/a", "logs") == "a" and below("x", "logs") is None


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "out").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not is_inside(str(tmp_path / "logs" / "out" / "x"), str(tmp_path / "logs"))
    assert is_inside(str(tmp_path / "loop" / "x"), str(tmp_path))

"""The prompts file: one a line, comments and blank lines skipped, one line for whatever is wrong."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.errors import UserError
from megaman.prompts import BUILT_IN, read_prompts


def test_one_prompt_a_line_in_order(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# mine\n\n  mega man,  blue robot \n\t# another comment\n洛克人, 藍色機器人\n   \nlast, no line end # here"
    )
    assert read_prompts(path) == ["mega man, blue robot", "洛克人, 藍色機器人", "last, no line end # here"]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_line_ends_and_byte_order_mark(tmp_path, ending, encoding):
    path = tmp_path / "prompts.txt"
    path.write_bytes(ending.join(["# first", "café", "", "robot", ""]).encode(encoding))
    assert read_prompts(path) == ["café", "robot"]


def test_there_are_ten_built_in_ones():
    prompts = read_prompts(BUILT_IN)
    assert len(prompts) == len(set(prompts)) == 10
    assert all("mega man" in prompt.lower() or "robot" in prompt.lower() for prompt in prompts)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# only\n#comments", b"\xef\xbb\xbf"])
def test_no_prompt_in_the_file(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--prompts_file .*empty\.txt holds no prompt.*one prompt a line"):
        read_prompts(path)


def test_a_missing_file_a_folder_and_another_encoding(tmp_path):
    with pytest.raises(UserError, match=r"--prompts_file .*none\.txt is missing"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"--prompts_file .* cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "western.txt").write_bytes("mega man, Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"western\.txt is not UTF-8 text.*Save it as UTF-8"):
        read_prompts(tmp_path / "western.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_with_its_mark(tmp_path, encoding):
    path = tmp_path / "wide.txt"
    path.write_bytes("\ufeff# mine\r\n洛克人 🤖\r\nrobot\r\n".encode(encoding))
    assert read_prompts(path) == ["洛克人 🤖", "robot"]
    path.write_bytes("no mark".encode(encoding))
    with pytest.raises(UserError, match="holds NUL characters"):
        read_prompts(path)
    path.write_bytes("\ufeffab".encode(encoding)[:-1])
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_prompts(path)


def test_control_characters_and_exotic_line_ends(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("blue\x07 \x1b[31mrobot\x0bsecond\u2028third\x7f\x9b\u202e".encode())
    assert read_prompts(path) == ["blue [31mrobot", "second", "third \u202e"]


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"robot\n" * 700_000)
    with pytest.raises(UserError, match=r"large\.txt is larger than"):
        read_prompts(path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no endless file here")
def test_an_endless_file_and_a_name_too_long():
    with pytest.raises(UserError, match="is larger than"):
        read_prompts(Path("/dev/zero"))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(Path("a" * 300))


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such mode")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.txt"
    path.touch(mode=0o000)
    with pytest.raises(UserError, match=r"--prompts_file .*secret\.txt cannot be read"):
        read_prompts(path)


# What is no text at all, and what nearly is: marks, comments, line ends and control characters among letters.
PIECES = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"#", b" ", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\x1b", b"\x85",
          b"\xc2\x85", "\u2028".encode(), b"robot", "洛克人".encode(), "é".encode("latin-1"), b"\xed\xa0\x80",
          "wide".encode("utf-16-le"), b"x" * 5000]  # fmt: skip
any_file = st.binary(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
any_file |= st.text(max_size=60).map(lambda text: text.encode("utf-16"))


@given(any_file)
def test_any_bytes_are_prompts_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any_prompts.txt"
    path.write_bytes(content)
    try:
        prompts = read_prompts(path)
    except UserError as error:
        assert "any_prompts.txt" in str(error) and "\n" not in str(error)
    else:
        assert prompts
        for prompt in prompts:
            assert prompt and prompt == " ".join(prompt.split()) and not prompt.startswith("#")
            assert len(prompt.splitlines()) == 1
            assert not any(unicodedata.category(letter) == "Cc" for letter in prompt)


@given(st.lists(st.text("abc, #é洛\t", max_size=12), max_size=8))
def test_every_line_that_is_no_comment_is_a_prompt(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "listed_prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    wanted = [" ".join(line.split()) for line in lines if line.strip() and line.strip()[0] != "#"]
    if wanted:
        assert read_prompts(path) == wanted
    else:
        with pytest.raises(UserError):
            read_prompts(path)

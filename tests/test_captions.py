"""Captions: whatever the encoding of the file beside the picture, and words from its name where there is none."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.captions import COMMON_ENDING, caption_for, caption_from_name, guessed_encoding, read_caption


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"mega man, blue robot", "mega man, blue robot"),
        ("é 洛克人".encode(), "é 洛克人"),
        (b"\xef\xbb\xbfmega man", "mega man"),
        ("mega man, é 洛克人".encode("utf-16"), "mega man, é 洛克人"),
        (b"\xfe\xff" + "mega man".encode("utf-16-be"), "mega man"),
        ("café — “blue”".encode("cp1252"), "café — “blue”"),
        (b"mega man,\r\n blue robot\r\n", "mega man, blue robot"),
        (b"mega man,\rblue robot", "mega man, blue robot"),
        (b"  mega   man\t,\n\n", "mega man ,"),
        (b"", None),
        (b" \r\n\t\n", None),
        (b"\xef\xbb\xbf", None),
        (b"\xff\xfe", None),
    ],
    ids=["ascii", "UTF-8", "UTF-8 with its mark", "UTF-16", "UTF-16 big", "cp1252", "CRLF", "CR", "spaces", "empty",
         "blank", "mark alone", "UTF-16 mark alone"],
)  # fmt: skip
def test_the_file_beside_the_picture(tmp_path, content, caption):
    (tmp_path / "robot_01.txt").write_bytes(content)
    picture = tmp_path / "robot_01.png"
    assert read_caption(picture) == caption
    found = caption is not None
    assert caption_for(picture) == (caption if found else f"robot, {COMMON_ENDING}", found)


def test_no_file_beside_the_picture(tmp_path):
    assert read_caption(tmp_path / "robot.png") is None
    assert caption_for(tmp_path / "boss_robot_03.png") == (f"boss robot, {COMMON_ENDING}", False)


def test_the_stem_decides_and_the_last_dot_ends_it(tmp_path):
    (tmp_path / "robot.v2.txt").write_text("the second")
    (tmp_path / "robot.txt").write_text("the first")
    assert read_caption(tmp_path / "robot.v2.png") == "the second"
    assert read_caption(tmp_path / "robot.png") == "the first"
    assert read_caption(tmp_path / "robot.v3.png") is None


def test_a_suffix_in_capitals_and_a_folder_of_that_name(tmp_path):
    (tmp_path / "a.TXT").write_text("capital")
    assert read_caption(tmp_path / "a.png") == "capital"
    (tmp_path / "b.txt").mkdir()
    assert read_caption(tmp_path / "b.png") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("megaman_x_02.jpg", "mega man x"),
        ("boss_robot_03.png", "boss robot"),
        ("megaman_01.png", "mega man"),
        ("MegaManX4.webp", "mega man x"),
        ("ProtoManStanding-2.png", "proto man standing"),
        ("protoman.bmp", "proto man"),
        ("Mega Man (blue) [1].jpeg", "mega man blue"),
        ("ROBOT.PNG", "robot"),
        ("robot.v2.final.png", "robot v final"),
        ("洛克人_01.png", "洛克人"),
        ("ロックマン-12.jpg", "ロックマン"),
        (unicodedata.normalize("NFD", "Pokémon_robot.png"), "pokémon robot"),
        ("机器人２.png", "机器人"),
    ],
)
def test_words_from_the_name(tmp_path, name, words):
    assert caption_from_name(tmp_path / name) == f"{words}, {COMMON_ENDING}"


@pytest.mark.parametrize("name", ["0001.png", "__-_.jpg", "2024-01-01 12.30.05.png", "１２.png"])
def test_a_name_without_words_leaves_the_ending_alone(tmp_path, name):
    assert caption_from_name(tmp_path / name) == COMMON_ENDING


def test_the_folder_does_not_count(tmp_path):
    assert caption_from_name(tmp_path / "a" / "robot.png") == caption_from_name(tmp_path / "b" / "robot.png")


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40))
def test_any_name_makes_one_tidy_line(tmp_path_factory, name):
    picture = tmp_path_factory.getbasetemp() / f"{name}.png"
    caption = caption_from_name(picture)
    assert caption == caption_from_name(picture), "the same name makes the same caption"
    assert caption.endswith(COMMON_ENDING) and caption == " ".join(caption.split())
    assert not any(mark.isdigit() for mark in caption if mark.isdecimal())


@given(st.binary(max_size=60))
def test_any_bytes_make_one_line_or_nothing(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any_caption.txt").write_bytes(content)
    caption = read_caption(folder / "any_caption.png")
    assert caption is None or (caption and caption == " ".join(caption.split()))


@given(st.text("abcé洛 ,\r\n\t", max_size=30), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_unicode_text_comes_back_whole(tmp_path_factory, text, encoding):
    folder = tmp_path_factory.getbasetemp()
    (folder / "text_caption.txt").write_bytes(text.encode(encoding))
    assert read_caption(folder / "text_caption.png") == (" ".join(text.split()) or None)


def test_a_guessed_encoding_is_known(tmp_path):
    for name, content in (("plain", "é".encode()), ("guessed", "é".encode("cp1252")), ("marked", "é".encode("utf-16"))):
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert guessed_encoding(tmp_path / "guessed.png") == tmp_path / "guessed.txt"
    assert [guessed_encoding(tmp_path / f"{name}.png") for name in ("plain", "marked", "none")] == [None] * 3

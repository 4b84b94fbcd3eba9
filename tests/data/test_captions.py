"""Captions: whatever the encoding of the file next to the image, and words from its name if there
is none."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.data.captions import (
    COMMON_ENDING,
    JOINERS,
    MAX_FILE_SIZE,
    Caption,
    CaptionAugmentation,
    add_affixes,
    caption_for,
    caption_from_name,
    contains,
    decode,
    names_a_side,
    split_tags,
    tidy,
    trigger_words,
)
from megaman.data.metadata_files import read_metadata


def read_caption(picture: Path) -> str | None:
    """The text of the file next to the image; None if the caption was made from the name."""
    caption = caption_for(picture)
    return caption.text if caption.from_file else None


def warning_of(caption: Caption) -> tuple[Path, str]:
    assert caption.warning is not None
    return caption.warning


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
    ids=[
        "ascii",
        "UTF-8",
        "UTF-8 with its mark",
        "UTF-16",
        "UTF-16 big",
        "cp1252",
        "CRLF",
        "CR",
        "spaces",
        "empty",
        "blank",
        "mark alone",
        "UTF-16 mark alone",
    ],
)
def test_the_file_next_to_the_picture(tmp_path, content, caption):
    (tmp_path / "robot_01.txt").write_bytes(content)
    picture = tmp_path / "robot_01.png"
    assert read_caption(picture) == caption
    text, from_file, *_ = caption_for(picture)
    assert from_file == (caption is not None)
    assert text == (caption or f"robot, {COMMON_ENDING}")


def test_no_file_next_to_the_picture(tmp_path):
    assert read_caption(tmp_path / "robot.png") is None
    assert caption_for(tmp_path / "boss_robot_03.png") == Caption(
        f"boss robot, {COMMON_ENDING}", False
    )


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


NO_WORDS = [
    "IMG_2031.jpg", "IMG-20240101-WA0007.jpg", "DSC0001.JPG", "dscn1234.jpg", "P1010023.jpg",
    "PXL_20240101_123456789.jpg", "Screenshot 2024-01-01 at 12.30.05.png", "xK3p9Qz7T1.png",
    "d41d8cd98f00b204e9800998ecf8427e.png", "123e4567-e89b-12d3-a456-426614174000.webp",
    "3f2a9c1d (2).png", "image_0004.png",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_WORDS)
def test_a_name_that_no_one_wrote_leaves_the_ending_to_the_trigger_word(tmp_path, name):
    assert caption_from_name(tmp_path / name) == COMMON_ENDING
    assert add_affixes(COMMON_ENDING, "volto") == f"volto, {COMMON_ENDING}"


@pytest.mark.parametrize(
    "name", ["facade_beef_2.png", "robot2024.png", "decade2020.png", "photo of volto 3.png"]
)
def test_words_that_look_alike_stay(tmp_path, name):
    assert caption_from_name(tmp_path / name) != COMMON_ENDING


@pytest.mark.parametrize("name", ["0001.png", "__-_.jpg", "2024-01-01 12.30.05.png", "１２.png"])
def test_a_name_without_words_leaves_the_ending_alone(tmp_path, name):
    assert caption_from_name(tmp_path / name) == COMMON_ENDING


def test_the_folder_does_not_count(tmp_path):
    assert caption_from_name(tmp_path / "a" / "robot.png") == caption_from_name(
        tmp_path / "b" / "robot.png"
    )


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40))
def test_any_name_makes_one_tidy_line(tmp_path_factory, name):
    picture = tmp_path_factory.getbasetemp() / f"{name}.png"
    caption = caption_from_name(picture)
    assert caption == caption_from_name(picture), "the same name makes the same caption"
    assert caption.endswith(COMMON_ENDING) and caption == " ".join(caption.split())
    assert not any(mark.isdigit() for mark in caption if mark.isdecimal())


ANY_BYTES = st.binary(max_size=60) | st.text(max_size=30).flatmap(
    lambda text: st.sampled_from(["utf-8", "utf-16", "utf-16-le", "cp1252", "cp932", "cp950"]).map(
        lambda encoding: text.encode(
            encoding, "replace" if encoding.startswith("cp") else "surrogatepass"
        )
    )
)


def is_control(mark: str) -> bool:
    return unicodedata.category(mark) in ("Cc", "Cf", "Cs") and mark not in JOINERS


@given(ANY_BYTES)
def test_any_bytes_make_one_visible_line_or_nothing(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any_caption.txt").write_bytes(content)
    caption = caption_for(folder / "any_caption.png")
    assert caption.text == " ".join(caption.text.split()) and caption.text.strip(JOINERS)
    assert not any(map(is_control, caption.text))
    assert tidy(caption.text) == caption.text
    assert caption.from_file or caption.warning, "a file that is not used is reported"
    (folder / "any_caption.txt").write_text(caption.text, encoding="utf-8")
    assert caption_for(folder / "any_caption.png") == Caption(caption.text, True, None, ".txt"), (
        "saved as UTF-8 it stays as it is"
    )


@given(st.text(max_size=40))
def test_tidy_keeps_what_can_be_seen(text):
    line = tidy(text)
    assert tidy(line) == line and not any(map(is_control, line))
    seen = [mark for mark in text if not mark.isspace() and not is_control(mark)]
    assert [mark for mark in line if mark != " "] == (
        seen if any(mark not in JOINERS for mark in seen) else []
    )


@given(st.text("abcé洛 ,\r\n\t", max_size=30), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_unicode_text_comes_back_whole(tmp_path_factory, text, encoding):
    folder = tmp_path_factory.getbasetemp()
    (folder / "text_caption.txt").write_bytes(text.encode(encoding))
    assert read_caption(folder / "text_caption.png") == (" ".join(text.split()) or None)


# What people write, in the encodings that they write it in.
WESTERN = """
    café · naïve robot, déjà vu · Größe, blaue Rüstung, Straße · Ära der Maschinen ·
    Älterer Roboter · Äpfel · señor robot, niño, ¿qué? · ¡Hola! ·
    robô azul, coração, ação, não · Ça va? garçon élève · blå rød grøn · Åke ·
    “blue” robot — don’t · it’s “fine” · …and more · © 2020 robot ® · 20° view ·
    robot «bleu» à côté · ÉLÉGANT · MÄNNLICH · GRÖSSE ÜBERALL · à · Ä · Äh · Öl · São Paulo ·
    Ñandú · Þór þing · façade · a²b · robot×hero · éèêë · õäöü"""
JAPANESE = """
    ロックマン · 青いロボット · ロックマン、青いロボット、ヘルメット · ろっくまん ·
    mega man, 青い · 青, 赤 · mega man 青い · 正面、白背景 ·
    ヘルメットをかぶった青いロボットが右を向いて走っている · エックス · ゼロ · 洛克人 · 少年 ·
    ボス · robot ロボット blue · ロボット01 · 「ロックマン」 · 赤 · 戦闘 · Ｘ · 青色の装甲"""
CHINESE = """
    洛克人 · 藍色機器人 · 洛克人，藍色機器人，頭盔，遊戲角色，細緻裝甲 · mega man, 藍色機器人 ·
    藍 · 藍, 紅 · 跳躍 · 站立，正面，白色背景 · 一個戴著頭盔的藍色機器人向右跑 · 「洛克人」 ·
    戰鬥姿勢 · 手砲 · robot 機器人 blue · 機器人01 · 洛克人X，白色盔甲 · 這是一張圖片 · 我的 ·
    的 · 夜晚星空"""
SIMPLIFIED = """
    机器人 · 机器人, 蓝色头盔 · 洛克人, 蓝色机器人 · 蓝 · 跳跃 · mega man, 蓝色盔甲 ·
    一位穿着红色外套的少女 ·
    教室里, 黄昏 · 微风吹过麦田 · 赛博朋克城市夜景 · 樱花树下 ·
    机甲战士 · 女孩, 长发, 微笑 · 坐在椅子上"""
KOREAN = """
    록맨 · 파란 로봇, 헬멧 · mega man, 파란 로봇 · 서 있는 모습, 정면 · 빨간 외투를 입은 소녀 ·
    밀밭에 부는 바람 · 사이버펑크 도시 야경 · 기계 전사 · 겨울, 눈 풍경 · 자동차, 도로, 일몰"""
EUC_JAPANESE = """
    ロックマン · 青いロボット、ヘルメット · mega man、青い装甲 · 赤いコートを着た少女 · 教室, 夕方 ·
    麦畑を吹き抜ける風 · 眠る赤ん坊 · 桜の木の下 · ボス · 正面、白背景 · 女の子, 長い髪, 笑顔"""
RUSSIAN = """
    синий робот, шлем · робот · mega man, синий · СИНИЙ РОБОТ · мой · я · девушка в красном пальто ·
    ветер над полем · ночной город · чёрные волосы · зима, снег · хлопець у синій броні"""
CENTRAL_EUROPEAN = """
    żółty robot, hełm · dziewczyna, długie włosy · łąka · śnieg, zima · święto ·
    modrý robot, přilba · červený plášť · běžící robot, noční město · šťastný · őszi erdő ·
    băiat în haină roşie · ľudia"""
TURKISH = """
    kırmızı robot, kask · sarışın kız · ışık · gökyüzü, yıldızlar · ağaç · kısa saç, yeşil göz ·
    dağ, kış"""
IN_LEGACY: list[tuple[str, str, str]] = []
for encoding, name, texts in [
    ("cp1252", "Windows-1252", WESTERN),
    ("shift_jis", "Shift-JIS", JAPANESE),
    ("big5", "Big5", CHINESE),
    ("gbk", "GBK", SIMPLIFIED),
    ("euc_kr", "EUC-KR", KOREAN),
    ("euc_jp", "EUC-JP", EUC_JAPANESE),
    ("cp1251", "Windows-1251", RUSSIAN),
    ("cp1250", "Windows-1250", CENTRAL_EUROPEAN),
    ("cp1254", "Windows-1254", TURKISH),
    ("koi8_r", "KOI8-R", "синий робот, шлем · ветер над полем · ночной город · чёрные волосы"),
]:
    IN_LEGACY += [(encoding, name, text.strip()) for text in texts.split("·")]


@pytest.mark.parametrize(("encoding", "name", "text"), IN_LEGACY, ids=str)
def test_encodings_that_have_to_be_guessed(encoding, name, text):
    assert decode(text.encode(encoding)) == (text, name)


@pytest.mark.parametrize("text", ["tűz", "İstanbul"])
def test_a_word_that_suits_several_encodings_is_read_as_western_with_a_warning(tmp_path, text):
    encoding = "cp1250" if text == "tűz" else "cp1254"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    caption = caption_for(tmp_path / "a.png")
    assert caption.text == text.encode(encoding).decode("cp1252")
    path, warning = warning_of(caption)
    assert path == tmp_path / "a.txt" and "was read as Windows-1252" in warning


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf16_without_its_mark_where_it_is_plain(order):
    for text in ("mega man", "méga man, blue, 洛克人"):
        assert decode(text.encode(f"utf-16-{order}")) == (text, "UTF-16")
    assert decode(b"a long ASCII text with one zero\0") == (
        "a long ASCII text with one zero\0",
        None,
    )


def test_control_characters_go_and_joiners_stay(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        "mega\0 man\x07,\u202e blue\ufeff 👩\u200d🚀 می\u200cخواهم".encode()
    )
    assert read_caption(tmp_path / "a.png") == "mega man, blue 👩\u200d🚀 می\u200cخواهم"
    for content in (bytes(range(1, 32)), "\u200d\u200f ".encode(), "\x85\x9f".encode()):
        (tmp_path / "a.txt").write_bytes(content)
        caption = caption_for(tmp_path / "a.png")
        assert not caption.from_file and "holds no text" in warning_of(caption)[1]


def test_a_guessed_encoding_is_known(tmp_path):
    for name, content in (
        ("plain", "é".encode()),
        ("guessed", "é".encode("cp1252")),
        ("marked", "é".encode("utf-16")),
    ):
        (tmp_path / f"{name}.txt").write_bytes(content)
    path, text = warning_of(caption_for(tmp_path / "guessed.png"))
    assert path == tmp_path / "guessed.txt" and "was read as Windows-1252" in text
    for name in ("plain", "marked", "none"):
        assert caption_for(tmp_path / f"{name}.png").warning is None


def test_a_file_that_cannot_be_read_gives_the_names_caption_and_is_reported(tmp_path):
    kinds = {"huge": "bytes are too many"}
    (tmp_path / "huge.txt").write_bytes(b"a" * (MAX_FILE_SIZE + 1))
    for name, target in (("gone", "nowhere"), ("loop", "loop")):
        (tmp_path / f"{name}.txt").symlink_to(f"{target}.txt")
        kinds[name] = "cannot be read"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        kinds["pipe"] = "not a file"
    for name, reason in kinds.items():
        caption = caption_for(tmp_path / f"{name}.png")
        assert (caption.text, caption.from_file) == (f"{name}, {COMMON_ENDING}", False)
        path, text = warning_of(caption)
        assert path == tmp_path / f"{name}.txt" and reason in text


def test_the_largest_caption_is_taken_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * MAX_FILE_SIZE)
    assert read_caption(tmp_path / "a.png") == "a" * MAX_FILE_SIZE


@pytest.mark.parametrize(
    ("caption", "is_sided"),
    [
        ("mega man, arm cannon on his left arm", True),
        ("Right hand up", True),
        ("facing LEFT", True),
        ("left-handed, right_arm", True),
        ("洛克人, 左手砲", True),
        ("ロックマン、右向き", True),
        ("bright background, upright, all rights reserved", False),
        ("leftover, copyright", False),
        ("", False),
    ],
)
def test_captions_that_name_a_side(caption, is_sided):
    assert names_a_side(caption) == is_sided


@pytest.mark.parametrize(
    ("caption", "trigger"),
    [
        ("藍色的洛克人, 站立", "洛克人"),
        ("洛克人在跑步", "洛克人"),
        ("青いロックマンが走る", "ロックマン"),
        ("ロックマン10号、青い", "ロックマン"),
        ("ﾛｯｸﾏﾝが走る", "ロックマン"),
        ("록맨이 달린다", "록맨"),
        ("หุ่นยนต์สีฟ้า", "สีฟ้า"),
        ("volto在跑步", "volto"),
        ("青いvoltoが走る", "volto"),
        ("ＶＯＬＴＯ，站立", "volto"),
        ("洛克人X跑步", "x"),
        ("xvolto, volto", "volto"),
    ],
)
def test_writing_without_spaces_contains_its_words(caption, trigger):
    assert contains(caption, trigger)
    assert add_affixes(caption, trigger) == caption


@pytest.mark.parametrize(
    ("caption", "trigger"),
    [
        ("megaton", "mega"),
        ("voltò", "volto"),
        ("volto\u0301", "volto"),
        ("volto_2", "volto"),
        ("синие роботы", "робот"),
        ("नीला", "नील"),
        ("在megaton旁", "mega"),
        ("藍色的機器人", "洛克人"),
    ],
)
def test_a_part_of_a_longer_word_is_another_word(caption, trigger):
    assert not contains(caption, trigger)
    assert add_affixes(caption, trigger) == f"{trigger}, {caption}"


def test_east_asian_commas_separate_tags():
    captions = ["洛克人，站立", "洛克人、跑步", "洛克人, 跳躍"]
    assert [split_tags(caption) for caption in captions] == [
        ["洛克人", "站立"],
        ["洛克人", "跑步"],
        ["洛克人", "跳躍"],
    ]
    assert trigger_words(captions) == "洛克人"
    shuffled = CaptionAugmentation(shuffle_caption=True, keep_tokens=1)
    results = {shuffled.apply("洛克人，站立，藍色", random.Random(seed)) for seed in range(9)}
    assert results == {"洛克人, 站立, 藍色", "洛克人, 藍色, 站立"}


@pytest.mark.parametrize(
    "content",
    [
        "赤".encode("euc_jp"),
        b"\x81\x8d\xff",
        bytes(range(128, 160)),
        "αγόρι".encode("cp1253"),
        "γάτα".encode("cp1253"),
        *(text.encode("cp1256") for text in ("عدو أحمر", "يركض", "رجل", "كلب")),
        "כלב גדול".encode("cp1255"),
        *(text.encode("iso8859_5") for text in ("кот", "шлем")),
    ],
)
def test_a_caption_in_an_encoding_that_is_unknown_is_not_used(tmp_path, content):
    (tmp_path / "robot.txt").write_bytes(content)
    caption = caption_for(tmp_path / "robot.png")
    assert (caption.text, caption.from_file) == (f"robot, {COMMON_ENDING}", False)
    path, text = warning_of(caption)
    assert (
        path == tmp_path / "robot.txt" and "encoding cannot be determined: save it as UTF-8" in text
    )


def test_a_metadata_file_in_an_encoding_that_is_unknown_is_not_understood(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\x81\x8d\xff\n")
    metadata = read_metadata(tmp_path / "metadata.csv")
    assert metadata.rows is None and "encoding cannot be determined" in metadata.warnings[0]
    for encoding, text in [("gbk", "蓝色机器人, 站立"), ("cp949", "파란 로봇, 헬멧")]:
        (tmp_path / "metadata.csv").write_bytes(f"file_name,text\na.png,{text}\n".encode(encoding))
        assert [row.caption for row in read_metadata(tmp_path / "metadata.csv").rows or []] == [
            text
        ]

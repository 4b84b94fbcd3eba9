"""Captions: the text file beside a picture, or, where there is none, words from the picture's name."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

COMMON_ENDING = "video game character, high quality"
# File names run words together that captions keep apart.
SPELLINGS = {"megaman": "mega man", "protoman": "proto man", "rockman": "rock man", "robotmaster": "robot master"}


def read_caption(picture: Path) -> str | None:
    """The caption in the .txt of the same stem, on one line; None where there is none or nothing stands in it."""
    path = _caption_file(picture)
    return (" ".join(_decode(path.read_bytes())[0].split()) or None) if path else None


def guessed_encoding(picture: Path) -> Path | None:
    """The picture's caption file where its encoding had to be guessed, so that a person can be told."""
    path = _caption_file(picture)
    return path if path and not _decode(path.read_bytes())[1] else None


def _caption_file(picture: Path) -> Path | None:
    candidates = (picture.with_suffix(suffix) for suffix in (".txt", ".TXT"))
    return next((path for path in candidates if path.is_file()), None)


def _decode(content: bytes) -> tuple[str, bool]:
    """The text, and whether its encoding is certain: UTF-8 with or without its mark, or UTF-16 with one. Anything else
    is read as Windows' Western encoding."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace"), True
    try:
        return content.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace"), False


def caption_from_name(picture: Path) -> str:
    """Make a caption of the file's name: megaman_x_02.jpg gives "mega man x, video game character, high quality".

    Numbers and separators are dropped; a name with no words in it, such as 0001.png, leaves the ending alone.
    """
    stem = unicodedata.normalize("NFC", picture.stem)  # macOS takes accents off their letters
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    words = re.sub(r"[\W\d_]+", " ", words).lower().split()
    name = " ".join(SPELLINGS.get(word, word) for word in words)
    return f"{name}, {COMMON_ENDING}" if name else COMMON_ENDING


def caption_for(picture: Path) -> tuple[str, bool]:
    """The caption to train with, and whether it was found (True) or made from the name (False)."""
    found = read_caption(picture)
    return (found, True) if found else (caption_from_name(picture), False)

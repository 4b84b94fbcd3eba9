"""Which encoding of Latin or Cyrillic letters a caption is in: a byte is a letter in all of them.

Windows-1252, -1250 and -1254 share most of the letters of Western Europe; the others are
distinguished by the alphabets of the languages. Windows-1251 and KOI8-R have other letters at each
byte, of which only one choice is as frequent as in Russian.
"""

from __future__ import annotations

import math
import re

WINDOWS_1252, WINDOWS_1251, KOI8_R = "cp1252", "cp1251", "koi8_r"
# Letters beyond a to z. Of two encodings that suit a text the first is taken: Western languages
# write most of the captions, and Turkish more than Romanian.
ALPHABETS = {
    WINDOWS_1252: (
        "àâæçèéêëîïôœùûüÿ",  # French
        "äöüß",  # German
        "áéíñóúü",  # Spanish
        "àáâãçéêíóôõúü",  # Portuguese
        "àèéìíîòóùú",  # Italian
        "àçèéíïòóúü",  # Catalan
        "æøåéèêóòôäöü",  # Danish, Norwegian, Swedish
        "áâéèêëíîïóôöúûü",  # Dutch, Welsh
        "äöõüšž",  # Estonian, Finnish
        "áðéíóúýþæö",  # Icelandic
        "áéíóúý",  # Faroese, Irish, and what Czech shares with them
    ),
    "cp1254": ("çğıöşüâîû",),  # Turkish
    "cp1250": (
        "ąćęłńóśźż",  # Polish
        "áčďéěíňóřšťúůýž",  # Czech
        "áäčďéíĺľňóôŕšťúýž",  # Slovak
        "áéíóöőúüű",  # Hungarian
        "ćčđšž",  # Croatian, Slovene
        "ăâîşţ",  # Romanian
    ),
}
TITLES = {"cp1250": "Windows-1250", "cp1254": "Windows-1254", KOI8_R: "KOI8-R"}
# Letters of a thousand in Russian; of Ukrainian's, what they have in Ukrainian.
FREQUENCIES = {
    "о": 110, "е": 85, "а": 80, "и": 74, "н": 67, "т": 63, "с": 55, "р": 47, "в": 45, "л": 44,
    "к": 35, "м": 32, "д": 30, "п": 28, "у": 26, "я": 20, "ы": 19, "ь": 17, "г": 17, "з": 17,
    "б": 16, "ч": 14, "й": 12, "х": 10, "ж": 9, "ш": 7, "ю": 6, "ц": 5, "щ": 4, "э": 3, "ф": 3,
    "ъ": 0.4, "ё": 2, "і": 50, "ї": 6, "є": 5, "ґ": 0.1,
}  # fmt: skip
MARGIN = 0.3  # by which KOI8-R, which is rare by now, has to be likelier, as a logarithm
CAPITALS = 0.3  # how much less likely, as a logarithm, a letter is in capitals throughout
# Where no language that is written in an encoding has these letters: within a word, at its end, or
# before others. Two dotless i are frequent in Turkish, and ý stands in their place.
IMPOSSIBLE = {
    WINDOWS_1252: re.compile(r"ý\w*ý|\Bþ|\bð|œ(?![cdsu])|õ\b|ã(?![eios]|\b)|\bè[aiou]"),
    "cp1254": re.compile(r"\bğ"),
    "cp1250": re.compile(r"ý\w*ý"),
}
LETTER = "a-zA-ZÀ-ÖØ-öø-žſ"
SEPARATORS = re.compile(r"[^\w¡¿²³¹ªº°©®™×¼½¾£¥¢¤¦§¨¬±´µ¶¸]+")
WORD = re.compile(
    rf"[¿¡©]?[{LETTER}]+\d*[®™]?"
    rf"|\d+[²³¹ªº°×½¼¾]?[{LETTER}]*\d*"  # 2º, 20m
    rf"|[{LETTER}]{{1,2}}[²³ºª][{LETTER}]?"  # m²
)


def choose_latin(content: bytes) -> str:
    """cp1252, or another encoding whose alphabets suit the text if those of cp1252 do not."""
    suitable = [encoding for encoding in ALPHABETS if _suits(content, encoding)]
    return suitable[0] if suitable else WINDOWS_1252


def choose_cyrillic(content: bytes) -> str:
    """cp1251 or koi8_r: the one in which the letters are as frequent as in Russian."""
    is_koi8 = _likelihood(content, KOI8_R) > _likelihood(content, WINDOWS_1251) + MARGIN
    return KOI8_R if is_koi8 else WINDOWS_1251


def _suits(content: bytes, encoding: str) -> bool:
    """Whether all letters beyond a to z are of one language's alphabet and stand where it has them,
    and signs stand outside of words."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return False
    words = [word for word in SEPARATORS.split(text) if any(map(str.isalpha, word))]
    if not all(map(WORD.fullmatch, words)) or IMPOSSIBLE[encoding].search(text.lower()):
        return False
    letters = {mark for mark in text.lower() if mark.isalpha() and mark not in "ªºµ"}
    beyond = {letter for letter in letters if letter > "\x7f"}
    return any(beyond <= set(alphabet) for alphabet in ALPHABETS[encoding])


def _likelihood(content: bytes, encoding: str) -> float:
    """Mean logarithm of the letters' frequencies; below those of any writing for what is none."""
    text = content.decode(encoding, errors="replace")
    letters = [letter for letter in text if letter > "\x7f" and letter.isalpha()]
    if not letters:
        return -math.inf
    total = sum(math.log(FREQUENCIES.get(letter.lower(), 0.01)) for letter in letters)
    capitals = sum(1 for letter in letters if letter.isupper())
    return (total - CAPITALS * capitals) / len(letters)

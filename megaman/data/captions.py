"""Captions: the text file beside a picture, or words from the picture's name; what is done to them
in training."""

from __future__ import annotations

import os
import random
import re
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COMMON_ENDING = "video game character, high quality"
# File names run words together that captions keep apart.
SPELLINGS = {
    "megaman": "mega man",
    "protoman": "proto man",
    "rockman": "rock man",
    "robotmaster": "robot master",
}
MOST_TOKENS = 75  # of a caption that CLIP reads
EXTENSIONS = (".txt", ".caption")  # the first that is there counts
LARGEST_FILE = 2**20  # bytes; 10,000 words are a tenth of it
JOINERS = "\u200c\u200d\u200e\u200f\u061c"  # invisible, but emoji and right-to-left text need them
INVISIBLE = ("Cc", "Cf", "Cs")  # Unicode's controls, format marks and lone surrogates
# Encodings that a text which is not Unicode may be in, by Python's name and the usual one. At a tie
# the first wins.
LEGACY = {"cp1252": "Windows-1252", "cp932": "Shift-JIS", "cp950": "Big5"}

# Words that a mirrored picture would belie. "right_arm" and "left-handed" are among them, "bright"
# is not.
SIDES = re.compile(r"(?<![a-z])(left|right)(?![a-z])|[左右]", re.IGNORECASE)
WESTERN = "’‘“”„…–—«»¿¡©®°€™½"  # marks that stand in Western text

# captions that are sentences give as many tags as pictures, and the header is read at every start
MOST_TAGS = 2000


class Caption(NamedTuple):
    """A caption to train with; whether it was found or made from the picture's name; where a person
    should know something about the file beside the picture, its path and that; and how the name of
    the file ends where it was found in one."""

    text: str
    found: bool
    remark: tuple[Path, str] | None = None
    suffix: str = ""


def caption_for(picture: Path, extension: str | None = None) -> Caption:
    """The text in the file of the same stem (caption_file), on one line; made from the picture's
    name where nothing stands there."""
    path = caption_file(picture, extension)
    if path is None:
        return Caption(caption_from_name(picture), False)
    try:
        text, guess = decode(content_of(path, LARGEST_FILE))
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}): the caption was made from the picture's name"
        return Caption(caption_from_name(picture), False, (path, reason))
    if not (text := tidy(text)):
        reason = "holds no text: the caption was made from the picture's name"
        return Caption(caption_from_name(picture), False, (path, reason))
    remark = f"is not UTF-8 and was read as {guess}: save it as UTF-8 if that is wrong"
    text = sys.intern(text)  # of pictures that share a caption each would have its own
    return Caption(text, True, (path, remark) if guess else None, path.suffix.lower())


def tells_a_side(caption: str) -> bool:
    """Whether the caption says left or right, in English, Chinese or Japanese."""
    return SIDES.search(caption) is not None


def caption_file(picture: Path, extension: str | None = None) -> Path | None:
    """The file of a picture's stem with that extension, .txt or .caption where none is given; None
    where there is none."""
    stem = os.path.splitext(picture)[
        0
    ]  # as text: Path would take most of the time with 100,000 pictures
    for suffix in [extension] if extension else EXTENSIONS:
        for form in (suffix, suffix.upper()):
            try:
                mode = os.lstat(stem + form).st_mode
            except OSError:
                continue
            if not (stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and os.path.isdir(stem + form))):
                return Path(stem + form)
    return None


def content_of(path: Path, largest: int) -> bytes:
    """A text file's bytes; raises OSError where it is no file, or one of more bytes than the
    largest."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        raise OSError("not a file")
    if status.st_size > largest:
        raise OSError(f"{status.st_size:,} bytes are no caption")
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def tidy(text: str) -> str:
    """The text on one line, without control and other invisible characters; empty where nothing
    visible is left."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    kept = (
        mark
        for mark in text
        if mark.isspace() or mark in JOINERS or unicodedata.category(mark) not in INVISIBLE
    )
    line = " ".join("".join(kept).split())
    return line if line.strip(JOINERS + " ") else ""


def decode(content: bytes) -> tuple[str, str | None]:
    """The text, and the name of its encoding where that had to be guessed.

    Certain are UTF-8 with or without its mark, and UTF-16 with one. Then a text of which every
    second byte or nearly so is zero is UTF-16 without a mark. Of the encodings in LEGACY the one in
    which the text looks most like writing is taken (plausibility).
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace"), None
    if order := _byte_order(content):
        return content.decode(f"utf-16-{order}", errors="replace"), "UTF-16"
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        pass
    best, choice = float("-inf"), (content.decode("cp1252", errors="replace"), LEGACY["cp1252"])
    for encoding, name in LEGACY.items():
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if (score := plausibility(text, encoding)) > best:
            best, choice = score, (text, name)
    return choice


def _byte_order(content: bytes) -> str | None:
    """le or be, where the text is UTF-16 without a mark: half of its characters or more are Latin,
    hence half zero."""
    first, second = content[::2].count(0), content[1::2].count(0)
    if len(content) % 2 or max(first, second) * 4 < len(content) or first == second:
        return None
    return "le" if second > first else "be"


def plausibility(text: str, encoding: str) -> float:
    """From -1 to 1: which share of the characters beyond ASCII looks like writing in that encoding,
    and which does not.

    In Windows-1252 those are accented letters and typographic marks: one, or two beside a plain
    letter. In Shift-JIS and Big5 they are kana, punctuation and the characters of the first level,
    the everyday half of either standard; but one alone beside a plain letter is an accented letter
    of another encoding.
    """
    good = total = 0
    for run in re.finditer(r"[^\x00-\x7f]+", text):
        total += len(run[0])
        around = text[max(run.start() - 1, 0) : run.start()] + text[run.end() : run.end() + 1]
        in_word = any(mark.isalpha() for mark in around)
        if encoding == "cp1252":
            if len(run[0]) == 1 or (len(run[0]) == 2 and in_word):
                good += sum(mark in WESTERN or (mark.isalpha() and mark != "ƒ") for mark in run[0])
        elif len(run[0]) >= 2 or not in_word:
            good += sum(_is_everyday(mark.encode(encoding), encoding) for mark in run[0])
    return (2 * good - total) / total if total else 0.0


def _is_everyday(code: bytes, encoding: str) -> bool:
    """Whether a character's code is in the part of Shift-JIS or Big5 that everyday writing uses: by
    its first byte."""
    if len(code) != 2:
        return False  # half-width katakana: any high byte could be one
    if encoding == "cp932":
        return 0x81 <= code[0] <= 0x83 or 0x88 <= code[0] <= 0x98
    return 0xA1 <= code[0] <= 0xC6


def caption_from_name(picture: Path) -> str:
    """Make a caption of the file's name: megaman_x_02.jpg gives "mega man x, video game character,
    high quality".

    Numbers and separators are dropped; a name with no words in it, such as 0001.png, leaves the
    ending alone.
    """
    stem = unicodedata.normalize("NFC", picture.stem)  # macOS takes accents off their letters
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    words = re.sub(r"[\W\d_]+", " ", words).lower().split()
    name = " ".join(SPELLINGS.get(word, word) for word in words)
    return f"{name}, {COMMON_ENDING}" if name else COMMON_ENDING


def contains(caption: str, words: str) -> bool:
    """Whether the words stand in the caption as words of their own, in whatever case."""
    return bool(re.search(rf"(?<!\w){re.escape(words.casefold())}(?!\w)", caption.casefold()))


def dressed(caption: str, trigger: str = "", prefix: str = "", suffix: str = "") -> str:
    """The caption between prefix and suffix, each with a space as in kohya's scripts; the trigger
    words and a comma in front of that where it does not contain them."""
    caption = " ".join(part for part in (prefix, caption, suffix) if part)
    return f"{trigger}, {caption}" if trigger and not contains(caption, trigger) else caption


class Variation(NamedTuple):
    """How captions differ from one visit to the next, under the names of kohya's flags."""

    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_tag_dropout_rate: float = 0.0
    caption_dropout_rate: float = 0.0

    @property
    def makes_new(self) -> bool:
        """Whether it makes captions that cannot be told beforehand."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0

    def of(self, caption: str, rng: random.Random) -> str:
        """The caption as it is read this time, as kohya's scripts vary it.

        With caption_dropout_rate as the probability it is empty. Else the tags, which are the parts
        between commas, are shuffled, and each is left out with caption_tag_dropout_rate as the
        probability; the first keep_tokens tags stay where they are.
        """
        if self.caption_dropout_rate and rng.random() < self.caption_dropout_rate:
            return ""
        if not self.makes_new:
            return caption
        tags = [tag.strip() for tag in caption.split(",")]
        kept, others = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if self.shuffle_caption:
            rng.shuffle(others)
        if self.caption_tag_dropout_rate:
            others = [tag for tag in others if rng.random() >= self.caption_tag_dropout_rate]
        return ", ".join([*kept, *others])


def tags(captions: Sequence[str]) -> Counter[str]:
    """How often each of the captions' parts between commas stands there, the most frequent
    first."""
    counted = Counter(
        tag.strip() for caption in captions for tag in caption.split(",") if tag.strip()
    )
    return Counter(dict(counted.most_common(MOST_TAGS)))


def trigger_words(captions: Sequence[str]) -> str:
    """What calls the character: the part that more than half of the captions begin with, "" where
    there is none."""
    first = Counter(caption.split(",")[0].strip() for caption in captions)
    words, count = first.most_common(1)[0] if first else ("", 0)
    return words if 2 * count > len(captions) else ""

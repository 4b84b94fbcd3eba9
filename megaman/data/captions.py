"""Captions: the text file next to an image, or words from the image's name; how captions are
augmented in training."""

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

from megaman.data.legacy_encodings import encoding_warning, guess

COMMON_ENDING = "video game character, high quality"
# File names run words together that captions keep apart.
SPELLINGS = {
    "megaman": "mega man",
    "protoman": "proto man",
    "rockman": "rock man",
    "robotmaster": "robot master",
}
# Parts of a name that are no words: a UUID, a hash, what a camera or a phone counts with, letters
# and digits mixed at random.
NO_WORDS = re.compile(
    r"""
    (?<![^\W_]) (?:
        [0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}
        | (?=[0-9a-f]*\d[a-f]) [0-9a-f]{8,}
        | [0-9a-f]{24,}
        | (?:img|image|dsc|dscn|dscf|pxl|mvimg|dcim|imgp|cimg|gopr|sam|vid|pict|photo|wa
          |screenshot|p) [-_ ]* \d[\d\W_]* (?:wa\d+|at[\d\W_]+)?
        | (?=\d*(?:[a-z]+\d+){3}) [0-9a-z]{8,}
    ) (?![^\W_])
    """,
    re.IGNORECASE | re.VERBOSE,
)
MAX_TOKENS = 75  # of a caption that CLIP reads
EXTENSIONS = (".txt", ".caption")  # the first that exists counts
MAX_FILE_SIZE = 2**20  # bytes; 10,000 words are a tenth of it
# Invisible, but emoji and right-to-left text need them.
JOINERS = "\u200c\u200d\u200e\u200f\u061c"
INVISIBLE = ("Cc", "Cf", "Cs")  # Unicode's controls, format characters and lone surrogates

# Words that are wrong for a mirrored image: "right_arm" and "left-handed" count, "bright" does not.
SIDES = re.compile(r"(?<![a-z])(left|right)(?![a-z])|[左右]", re.IGNORECASE)
# Scripts without spaces between words, and Korean, which joins its particles to the words: Thai to
# Myanmar, Hangul, Khmer, radicals, kana and signs, Han, Yi, Hangul, compatibility forms, kana, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"
    "\u2e80-\u2fdf\u3005-\u9fff\ua000-\ua4cf\ua960-\ua97f\uaa60-\uaa7f\uac00-\ud7ff"
    "\uf900-\ufaff\uff65-\uffdc\U00016fe0-\U0001b2ff\U00020000-\U0003ffff]"
)

TAG_SEPARATOR = re.compile("[,，、]")  # the last two in East Asian writing

# Captions that are sentences give as many tags as images, and the header is read at every start.
MAX_TAGS = 2000


class UnknownEncodingError(ValueError):
    """Bytes that are not Unicode, in an encoding that cannot be determined."""

    def __init__(self) -> None:
        super().__init__("is not UTF-8, and its encoding cannot be determined: save it as UTF-8")


class Caption(NamedTuple):
    """A caption to train with.

    from_file is False if the text was made from the image's name. warning is the path of the
    caption file and what the user should know about it; suffix is the extension of the file that
    was used, in lower case.
    """

    text: str
    from_file: bool
    warning: tuple[Path, str] | None = None
    suffix: str = ""


def caption_for(image: Path, extension: str | None = None) -> Caption:
    """The text of the image's caption file (`caption_file`) on one line; made from the image's name
    if there is no such text."""
    path = caption_file(image, extension)
    if path is None:
        return Caption(caption_from_name(image), False)
    try:
        text, guessed_encoding = decode(read_small_file(path, MAX_FILE_SIZE))
    except OSError as error:
        reason = error.strerror or error
        warning = f"cannot be read ({reason}): the caption was made from the image's name"
        return Caption(caption_from_name(image), False, (path, warning))
    except UnknownEncodingError as error:
        warning = f"{error}. The caption was made from the image's name"
        return Caption(caption_from_name(image), False, (path, warning))
    text = tidy(text)
    if not text:
        warning = "holds no text: the caption was made from the image's name"
        return Caption(caption_from_name(image), False, (path, warning))
    text = sys.intern(text)  # images that share a caption share the string
    warning = (path, encoding_warning(guessed_encoding)) if guessed_encoding else None
    return Caption(text, True, warning, path.suffix.lower())


def names_a_side(caption: str) -> bool:
    """Whether the caption says left or right, in English, Chinese or Japanese."""
    return SIDES.search(caption) is not None


def caption_file(image: Path, extension: str | None = None) -> Path | None:
    """The file with the image's stem and the extension, by default .txt or else .caption; None if
    there is none."""
    # As text: with 100,000 images, Path would take most of the time.
    stem = os.path.splitext(image)[0]
    for suffix in [extension] if extension else EXTENSIONS:
        for name in (stem + suffix, stem + suffix.upper()):
            try:
                mode = os.lstat(name).st_mode
            except OSError:
                continue
            if not (stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and os.path.isdir(name))):
                return Path(name)
    return None


def read_small_file(path: Path, max_size: int) -> bytes:
    """A file's bytes; raises OSError if it is not a regular file or has more than max_size
    bytes."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
        raise OSError("not a file")
    if status.st_size > max_size:
        raise OSError(f"{status.st_size:,} bytes are too many")
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def tidy(text: str) -> str:
    """The text on one line, without control and other invisible characters; empty if nothing
    visible is left."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    line = " ".join("".join(filter(_is_visible, text)).split())
    return line if line.strip(JOINERS + " ") else ""


def _is_visible(character: str) -> bool:
    """Whether a character is visible, white space, or needed by its neighbors."""
    if character.isspace() or character in JOINERS:
        return True
    return unicodedata.category(character) not in INVISIBLE


def decode(content: bytes) -> tuple[str, str | None]:
    """The text, and the name of its encoding if that had to be guessed.

    UTF-8 with or without a byte order mark and UTF-16 with one are certain. A text in which about
    every second byte is zero is UTF-16 without a mark. Any other is in the
    encoding in which it looks most like writing (`legacy_encodings.guess`).

    Raises UnknownEncodingError if none is clearly the most likely.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace"), None
    if order := _byte_order(content):
        return content.decode(f"utf-16-{order}", errors="replace"), "UTF-16"
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        guessed = guess(content)
    if guessed is None:
        raise UnknownEncodingError
    return guessed


def _byte_order(content: bytes) -> str | None:
    """le or be if the text is UTF-16 without a mark: if half of its characters or more are Latin,
    half of those bytes are zero."""
    even_zeros, odd_zeros = content[::2].count(0), content[1::2].count(0)
    if len(content) % 2 or max(even_zeros, odd_zeros) * 4 < len(content):
        return None
    if even_zeros == odd_zeros:
        return None
    return "le" if odd_zeros > even_zeros else "be"


def caption_from_name(image: Path) -> str:
    """A caption made from the file's name: megaman_x_02.jpg gives "mega man x, video game
    character, high quality".

    Numbers, separators, hashes and a camera's counters are dropped; a name without words, such as
    0001.png or IMG_2031.jpg, gives the ending alone.
    """
    stem = unicodedata.normalize("NFC", image.stem)  # macOS separates accents from letters
    stem = NO_WORDS.sub(" ", stem)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    words = re.sub(r"[\W\d_]+", " ", words).lower().split()
    name = " ".join(SPELLINGS.get(word, word) for word in words)
    return f"{name}, {COMMON_ENDING}" if name else COMMON_ENDING


def contains(caption: str, words: str) -> bool:
    """Whether the caption contains the words as whole words, ignoring case and width.

    Where a script puts spaces between its words, a letter next to the words makes them part of a
    longer one ("mega" in "megaton"). Where it does not (`UNSPACED`), what stands next to them means
    nothing.
    """
    text, wanted = (unicodedata.normalize("NFKC", part).casefold() for part in (caption, words))
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not (_is_joined(text, start) or _is_joined(text, end)):
            return True
        start = text.find(wanted, start + 1)
    return False


def _is_joined(text: str, index: int) -> bool:
    """Whether the characters before and at the index belong to one word."""
    pair = text[max(index - 1, 0) : index + 1]
    return 0 < index < len(text) and all(_is_word_letter(character) for character in pair)


def _is_word_letter(character: str) -> bool:
    """Whether it is a letter, digit, accent or _ of a script with spaces between its words."""
    if UNSPACED.match(character):
        return False
    return (
        character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    )


def add_affixes(caption: str, trigger: str = "", prefix: str = "", suffix: str = "") -> str:
    """The caption between prefix and suffix, joined with spaces as in kohya's scripts; the trigger
    words and a comma go first unless the caption contains them already."""
    caption = " ".join(part for part in (prefix, caption, suffix) if part)
    return f"{trigger}, {caption}" if trigger and not contains(caption, trigger) else caption


class CaptionAugmentation(NamedTuple):
    """How captions differ from one visit to the next, under the names of kohya's flags."""

    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_tag_dropout_rate: float = 0.0
    caption_dropout_rate: float = 0.0

    def apply(self, caption: str, rng: random.Random) -> str:
        """The caption for one visit, augmented as in kohya's scripts.

        It is empty with probability caption_dropout_rate. Otherwise the tags, which are the parts
        between commas, are shuffled, and each is dropped with probability caption_tag_dropout_rate;
        the first keep_tokens tags stay where they are.
        """
        if self.caption_dropout_rate and rng.random() < self.caption_dropout_rate:
            return ""
        if not self.shuffle_caption and not self.caption_tag_dropout_rate:
            return caption
        tags = [tag.strip() for tag in TAG_SEPARATOR.split(caption)]
        kept, others = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if self.shuffle_caption:
            rng.shuffle(others)
        if self.caption_tag_dropout_rate:
            others = [tag for tag in others if rng.random() >= self.caption_tag_dropout_rate]
        return ", ".join([*kept, *others])


def split_tags(caption: str) -> list[str]:
    """The parts of a caption between its commas, without those that are blank."""
    return [tag for part in TAG_SEPARATOR.split(caption) if (tag := part.strip())]


def count_tags(captions: Sequence[str]) -> Counter[str]:
    """How often each tag occurs in the captions, the most frequent first, MAX_TAGS at most."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(split_tags(caption))
    return Counter(dict(counts.most_common(MAX_TAGS)))


def trigger_words(captions: Sequence[str]) -> str:
    """The words that call the character: the tag that more than half of the captions begin with, ""
    if there is none."""
    first_tags = Counter(TAG_SEPARATOR.split(caption, 1)[0].strip() for caption in captions)
    words, count = first_tags.most_common(1)[0] if first_tags else ("", 0)
    return words if 2 * count > len(captions) else ""

"""Checks of a training set's captions for the dataset doctor: missing, unusable, shared, too long,
without the trigger word."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from megaman.data.captions import MAX_TOKENS, contains
from megaman.data.legacy_encodings import is_encoding_warning
from megaman.doctor.findings import CheckedImage, Finding, relative_name, shorten
from megaman.errors import plural

# If at most this share of the captions lacks what the others begin with, it was forgotten.
RARE_SHARE = 0.1


def check_captions(
    images: Sequence[CheckedImage],
    warnings: dict[str, tuple[Path, str]],
    folder: Path,
    may_share: bool = False,
) -> Iterator[Finding]:
    """Captions that are missing, unusable, shared by several images, or too long.

    warnings has for some images, by path, the caption file and what is odd about it; folder is the
    data folder. With may_share, several images may have the same caption.
    """
    details = {
        path: f"{relative_name(file, folder)} {text}" for path, (file, text) in warnings.items()
    }
    yield from _missing(images, details)
    yield from _unusable(images, details)
    yield from _odd_encoding(images, details)
    yield from _shared(images, may_share)
    yield from _too_long(images)


def _missing(images: Sequence[CheckedImage], warnings: dict[str, str]) -> Iterator[Finding]:
    made = [image for image in images if not image.caption_from_file]
    files = [image.path for image in made if image.path not in warnings]
    if files:
        yield Finding(
            "no_caption",
            True,
            f"{plural(len(files), 'image')} without a caption",
            "Write what varies into NAME.txt next to each, or let --auto_caption do it",
            files,
            {image.path: f"made from its name: {image.caption}" for image in made},
        )


def _unusable(images: Sequence[CheckedImage], warnings: dict[str, str]) -> Iterator[Finding]:
    made = [image.path for image in images if not image.caption_from_file]
    files = [path for path in made if path in warnings]
    if files:
        yield Finding(
            "empty_caption",
            True,
            f"{plural(len(files), 'caption')} empty or unreadable",
            "Write what the image shows into the file",
            files,
            warnings,
        )


def _odd_encoding(images: Sequence[CheckedImage], warnings: dict[str, str]) -> Iterator[Finding]:
    written = [image.path for image in images if image.caption_from_file]
    files = [path for path in written if path in warnings]
    if files:
        yield Finding(
            "encoding",
            False,
            f"{plural(len(files), 'caption')} with a warning",
            "Check the text, and save it as UTF-8",
            files,
            warnings,
        )


def _shared(images: Sequence[CheckedImage], may_share: bool) -> Iterator[Finding]:
    by_caption: dict[str, list[str]] = defaultdict(list)
    for image in images:
        if image.caption_from_file:
            by_caption[" ".join(image.caption.casefold().split())].append(image.path)
    files: list[str] = []
    pairs: list[tuple[str, str, str]] = []
    for first, *others in by_caption.values():
        if others:
            files += [first, *others]
            pairs += [(first, other, "the same caption") for other in others]
    if files:
        everywhere = len(by_caption) == 1 and len(files) == len(images)
        title = f"{plural(len(files), 'image')} with the same caption as another"
        yield Finding(
            "doubled_caption",
            not (everywhere or may_share),
            "every image has the same caption" if everywhere else title,
            "Name what differs; what is not named becomes part of the character",
            files,
            {image.path: image.caption for image in images},
            pairs,
        )


def _too_long(images: Sequence[CheckedImage]) -> Iterator[Finding]:
    lengths = {
        image.path: estimate_tokens(image.caption) for image in images if image.caption_from_file
    }
    files = [path for path, length in lengths.items() if length > MAX_TOKENS]
    if files:
        yield Finding(
            "long_caption",
            True,
            f"{plural(len(files), 'caption')} longer than {MAX_TOKENS} tokens, by estimate",
            "Put what matters first and shorten the rest: what is beyond is cut off",
            files,
            {path: f"about {length} tokens" for path, length in lengths.items()},
        )


def check_metadata(warnings: Sequence[tuple[Path, str]], folder: Path) -> Iterator[Finding]:
    """Lines of metadata files that could not be used, and files that are not in UTF-8."""
    unused, guessed = [], []
    for file, text in warnings:
        kind = guessed if is_encoding_warning(text) else unused
        kind.append(f"{relative_name(file, folder)} {text}")
    if unused:
        title = f"{plural(len(unused), 'warning')} about metadata files: {shorten(unused, 3)}"
        yield Finding("metadata", True, title, "Fix these lines: they are not used", [])
    if guessed:
        title = f"the encoding of metadata files was guessed: {shorten(guessed, 3)}"
        yield Finding("metadata_encoding", False, title, "Check the text, and save it as UTF-8", [])


def check_trigger(
    images: Sequence[CheckedImage], trigger: str, inferred: bool
) -> Iterator[Finding]:
    """Captions without the trigger words. If these were inferred and many captions lack them, that
    may be intended."""
    written = [image for image in images if image.caption_from_file]
    files = [image.path for image in written if trigger and not contains(image.caption, trigger)]
    if files:
        yield Finding(
            "no_trigger",
            not inferred or len(files) <= RARE_SHARE * len(written),
            f"{plural(len(files), 'caption')} without the trigger word {trigger!r}",
            f"Begin each caption with it, unless the image shows something other than {trigger}",
            files,
            {image.path: image.caption for image in written},
        )
    elif inferred and not trigger and len(written) > 1:
        yield Finding(
            "no_agreement",
            False,
            "no word that most captions begin with",
            "Begin every caption with the same name for the character: it will trigger the LoRA",
            [],
        )


def check_class_captions(images: Sequence[CheckedImage], trigger: str) -> Iterator[Finding]:
    """Captions of class images with the trigger words, also those made from names."""
    files = [image.path for image in images if trigger and contains(image.caption, trigger)]
    if files:
        yield Finding(
            "class_trigger",
            True,
            f"{plural(len(files), 'caption')} of class images with the trigger word {trigger!r}",
            "Take it out, or move the image to --data_dir: class images hold other things",
            files,
            {image.path: image.caption for image in images},
        )


def estimate_tokens(caption: str) -> int:
    """About how many tokens CLIP's tokenizer makes of a caption, without the two at its ends.

    A rule, so that nothing has to be loaded: every digit, every run of punctuation and almost every
    common English word is one token; long and rare words are split. A Chinese character makes
    three, a letter of other scripts beyond Latin one. English tags and sentences came out within a
    fifth of CLIP's own count.
    """
    pieces = re.findall(r"[a-z\u00c0-\u024f]+|\d|[^\w\s]+|\w", caption.casefold())
    return sum(_tokens_in(piece) for piece in pieces)


def _tokens_in(piece: str) -> int:
    if "\u3400" <= piece <= "\u9fff":
        return 3
    return 1 + (len(piece) - 3) // 7 if len(piece) > 9 else 1

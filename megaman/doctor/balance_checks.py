"""Checks of what a training set shows how often, by the captions' own words, for the dataset
doctor: views, directions, poses, framing, and a phrase that nearly every caption has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from megaman.doctor.findings import CheckedImage, Finding
from megaman.doctor.term_checks import words_of
from megaman.errors import plural

MIN_CAPTIONS = 10  # in fewer, nothing can be said of shares
MIN_NAMED = 5  # captions that name a kind, to speak of its balance
NEARLY_ALL = 0.9
PHRASE_WORDS = range(12, 1, -1)  # words in a phrase, the longest first
TURNED = r"(?:fac|look|turn|walk|run|head|aim|point|mov)\w* (?:to )?(?:the |his |her )?"


def _side(english: str, chinese: str) -> str:
    """A pattern for what faces a side; an arm on the left does not."""
    return (
        rf"\b{TURNED}{english}\b|\b{english}[- ](?:facing|profile|side view)\b"
        rf"|\bfrom the {english}\b|向{chinese}|{chinese}向"
    )


# Each kind of thing, and its values with the words for them; the first value that fits counts.
KINDS: dict[str, dict[str, str]] = {
    "a direction": {"left": _side("left", "左"), "right": _side("right", "右")},
    "a view": {
        "back view": r"\b(?:back|rear) view\b|\bfrom behind\b|背面|后视|後視|後ろ",
        "side view": r"\bside view\b|\bfrom the side\b|\bprofile\b|\bfacing (?:left|right)\b"
        r"|侧面|側面|横顔",
        "three-quarter view": r"\b(?:three[- ]quarters?|3/4)(?: view)?\b",
        "front view": r"\bfront(?:al)? view\b|\bfrom the front\b"
        r"|\bfacing (?:forward|the (?:viewer|camera))\b|正面",
    },
    "a pose": {
        "standing": r"\bstand(?:s|ing)?\b|站",
        "walking": r"\bwalk(?:s|ing)?\b|走",
        "running": r"\brun(?:s|ning)?\b|跑|走る",
        "jumping": r"\b(?:jump|leap)(?:s|ing)?\b|跳",
        "sitting": r"\bsit(?:s|ting)?\b|坐|座",
        "crouching": r"\b(?:crouch|kneel)(?:es|s|ing)?\b|蹲",
        "shooting": r"\b(?:shoot|fir|aim)(?:s|es|ing)?\b|射",
        "fighting": r"\b(?:fight|attack|punch|kick)(?:es|s|ing)?\b",
        "flying": r"\bfl(?:y|ies|ying)\b|飞|飛",
        "climbing": r"\bclimb(?:s|ing)?\b",
        "lying": r"\b(?:lies|lying|sleep(?:s|ing)?)\b|躺",
    },
    "a framing": {
        "portrait": r"\b(?:portrait|close[- ]up|headshot|face only)\b|特写|特寫|顔",
        "upper body": r"\b(?:upper body|bust|waist up)\b|半身",
        "full body": r"\b(?:full[- ](?:body|length)|whole body)\b|全身",
    },
}  # fmt: skip
# What a set should not lack if it names the kind at all.
EXPECTED = {
    "a direction": ("left", "right"),
    "a view": ("front view", "side view", "back view"),
}


def check_balance(images: Sequence[CheckedImage], trigger: str) -> Iterator[Finding]:
    """What nearly all captions share, what hardly any of them names, and what none does; remarks,
    since it may be intended."""
    written = [image for image in images if image.caption_from_file]
    if len(written) < MIN_CAPTIONS:
        return
    counts = {kind: count_values(written, kind) for kind in KINDS}
    for kind, values in counts.items():
        yield from _one_sided(kind, values, written)
    yield from _unnamed(counts, len(written))
    yield from _phrase_in_nearly_all(written, trigger)


def count_values(images: Sequence[CheckedImage], kind: str) -> Counter[str]:
    """How many captions name each value of a kind, the most frequent first."""
    named = [value_in(image.caption, kind) for image in images]
    return Counter(dict(Counter(value for value in named if value).most_common()))


def value_in(caption: str, kind: str) -> str | None:
    """The value of a kind that a caption names, if any."""
    text = caption.casefold()
    return next((value for value, words in KINDS[kind].items() if re.search(words, text)), None)


def _one_sided(
    kind: str, values: Counter[str], images: Sequence[CheckedImage]
) -> Iterator[Finding]:
    named = sum(values.values())
    if named < MIN_NAMED:
        return
    value, count = values.most_common(1)[0]
    missing = [other for other in EXPECTED.get(kind, ()) if not values[other]]
    is_usual = 2 * named >= len(images)  # a few portraits say nothing about the others
    if not missing and not (is_usual and count >= NEARLY_ALL * named):
        return
    shown = ", ".join(f"{other} {number}" for other, number in values.items())
    title = f"{plural(named, 'caption')} name {kind}: {shown}"
    if missing:
        title += f"; none {' or '.join(missing)}"
    yield Finding(
        f"balance_{kind.split()[-1]}",
        False,
        title,
        "Add images of what is rare: the LoRA will show mostly what it has seen",
        [image.path for image in images if value_in(image.caption, kind) == value],
    )


def _unnamed(counts: dict[str, Counter[str]], total: int) -> Iterator[Finding]:
    kinds = [kind for kind in ("a view", "a pose") if not counts[kind]]
    if kinds:
        yield Finding(
            "balance_unnamed",
            False,
            f"none of {total} captions names {' or '.join(kinds)}",
            "Name what varies, such as front view or running, so that prompts can ask for it",
            [],
        )


def _phrase_in_nearly_all(images: Sequence[CheckedImage], trigger: str) -> Iterator[Finding]:
    captions = {image.path: words_of(image.caption) for image in images}
    phrase = common_phrase(list(captions.values()), set(words_of(trigger)))
    if phrase:
        others = [path for path, words in captions.items() if not _contains(words, phrase)]
        yield Finding(
            "in_nearly_all",
            False,
            f"{len(images) - len(others)} of {len(images)} captions contain {' '.join(phrase)!r}",
            "Remove what says nothing, such as a captioner's opening; the rest lack it",
            others,
        )


def common_phrase(captions: Sequence[Sequence[str]], known: set[str]) -> tuple[str, ...]:
    """The longest run of words, not all of them known, in nearly all captions but not in all; empty
    if there is none."""
    for length in PHRASE_WORDS:
        counts: Counter[tuple[str, ...]] = Counter()
        for words in captions:
            starts = range(len(words) - length + 1)
            counts.update({tuple(words[start : start + length]) for start in starts})
        for phrase, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            if count < NEARLY_ALL * len(captions):
                break
            if not known.issuperset(phrase):
                return phrase if count < len(captions) else ()
    return ()


def _contains(words: Sequence[str], phrase: tuple[str, ...]) -> bool:
    starts = range(len(words) - len(phrase) + 1)
    return any(tuple(words[start : start + len(phrase)]) == phrase for start in starts)

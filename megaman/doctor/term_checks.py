"""Checks of the tags or words of a training set's captions for the dataset doctor, and likely
typos."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from megaman.data.captions import UNSPACED, split_tags
from megaman.doctor.findings import CheckedImage, Finding, shorten
from megaman.errors import plural

# Words: if the parts of a caption have at least so many (the median), they are sentences, not tags.
MIN_SENTENCE = 5
STOP_WORDS = re.compile(
    r"a|an|the|of|and|or|in|on|at|by|to|with|from|for|is|are|as|its?|his|her|their|this|that"
)
# Letters: one more or less makes another word of many a shorter one.
MIN_TYPO_LENGTH = 5
MIN_FREQUENCY = 5  # of a word to be the correct form of a typo
MIN_CAPTIONS = 3  # for checks of what is in every caption or in one only


def check_terms(
    images: Sequence[CheckedImage], term: str, terms: Sequence[Sequence[str]], trigger: str | None
) -> Iterator[Finding]:
    """Terms that occur twice in a caption, in one caption only, or in all of them; likely typos.

    term and terms are those of `split_terms`, for the images with a written caption. trigger is
    None for class images, whose captions have no trigger words and ought to have the class in
    common.
    """
    written = [image for image in images if image.caption_from_file]
    terms_of = {image.path: words for image, words in zip(written, terms, strict=True)}
    if term == "tags":
        yield from _duplicate_tags(terms_of)
    yield from _typos(written)
    if len(written) >= MIN_CAPTIONS:
        counts = count_terms(terms)
        if trigger is not None:
            yield from _in_every_caption(counts, len(written), term, trigger)
        yield from _in_one_caption(counts, terms_of, term)


def _duplicate_tags(tags_of: dict[str, Sequence[str]]) -> Iterator[Finding]:
    duplicates = {path: duplicate_tags(tags) for path, tags in tags_of.items()}
    details = {path: ", ".join(tags) for path, tags in duplicates.items() if tags}
    if details:
        title = f"{plural(len(details), 'caption')} with a tag twice"
        yield Finding("tag_twice", True, title, "Keep one of the two", list(details), details)


def _typos(images: Sequence[CheckedImage]) -> Iterator[Finding]:
    typos = likely_typos([image.caption for image in images])
    details = {}
    for image in images:
        words = [word for word in words_of(image.caption) if word in typos]
        if words:
            details[image.path] = ", ".join(f"{word} ({typos[word]}?)" for word in words)
    if typos:
        yield Finding(
            "slips",
            False,
            f"{plural(len(typos), 'likely typo')}: {shorten(list(typos))}",
            "Compare with the word that occurs often",
            list(details),
            details,
        )


def _in_every_caption(
    counts: Counter[str], num_captions: int, term: str, trigger: str
) -> Iterator[Finding]:
    known = {trigger.casefold(), *words_of(trigger)}
    everywhere = [word for word, count in counts.items() if count == num_captions]
    unexpected = [word for word in everywhere if word.casefold() not in known]
    if unexpected:
        yield Finding(
            "in_every",
            False,
            f"{term} in every caption: {shorten(unexpected)}",
            "Right for what never changes; it becomes part of what the trigger word means",
            [],
        )


def _in_one_caption(
    counts: Counter[str], terms_of: dict[str, Sequence[str]], term: str
) -> Iterator[Finding]:
    once = [word for word, count in counts.items() if count == 1]
    if once:
        details = {
            path: shorten([word for word in words if counts[word] == 1])
            for path, words in terms_of.items()
        }
        yield Finding(
            "in_one",
            False,
            f"{term} in one caption only ({len(once)} of {len(counts)}): {shorten(once)}",
            "Look for typos and for two words for the same thing",
            [path for path, words in details.items() if words],
            details,
        )


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, without digits."""
    return re.findall(r"[^\W\d_]+", caption.casefold())


def split_terms(captions: Sequence[str]) -> tuple[str, list[list[str]]]:
    """ "tags" and the parts of each caption between its commas; or, if the captions are sentences,
    "words" and the words of each."""
    tags = [_tags_of(caption) for caption in captions]
    lengths: list[int] = []
    for parts in tags:
        lengths += [len(tag.split()) for tag in parts]
    lengths.sort()
    if lengths and lengths[len(lengths) // 2] < MIN_SENTENCE:
        return "tags", tags
    words = [re.findall(r"\w[\w'-]*", caption.casefold()) for caption in captions]
    return "words", [_without_stop_words(one) for one in words]


def _tags_of(caption: str) -> list[str]:
    return [" ".join(tag.split()) for tag in split_tags(caption)]


def _without_stop_words(words: Iterable[str]) -> list[str]:
    return [word for word in words if not STOP_WORDS.fullmatch(word)]


def count_terms(terms: Iterable[Iterable[str]]) -> Counter[str]:
    """In how many captions each term occurs, the most frequent first."""
    counts: Counter[str] = Counter()
    for words in terms:
        counts.update(set(words))
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def duplicate_tags(tags: Sequence[str]) -> list[str]:
    """The tags that occur more than once in a caption."""
    return [tag for tag, count in Counter(tag.casefold() for tag in tags).items() if count > 1]


def likely_typos(captions: Iterable[str]) -> dict[str, str]:
    """Words that occur in one caption only and are one letter away from a frequent one, with that
    one: antena, antenna.

    Two words are one letter apart if dropping one letter of either makes them equal, or swapping
    two neighbors. Writing without spaces has no words to compare.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        words = {word for word in words_of(caption) if len(word) >= MIN_TYPO_LENGTH}
        counts.update(word for word in words if not UNSPACED.search(word))
    frequent_by_form: dict[str, set[str]] = defaultdict(set)
    for word, count in counts.items():
        if count >= MIN_FREQUENCY:
            for form in _forms(word):
                frequent_by_form[form].add(word)
    typos = {}
    for word, count in counts.items():
        if count == 1:
            similar: set[str] = set()
            for form in _forms(word):
                similar |= frequent_by_form.get(form, set())
            candidates = sorted(other for other in similar if _is_typo(word, other))
            if candidates:
                typos[word] = max(candidates, key=counts.__getitem__)
    return typos


def _forms(word: str) -> set[str]:
    """The word, and the word without each of its letters."""
    return {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}


def _is_typo(word: str, other: str) -> bool:
    """Whether a letter is missing, added or swapped; a plural is no typo, nor is one letter in
    place of another (tower, towel)."""
    if len(word) == len(other):
        return sorted(word) == sorted(other)
    return word.rstrip("s") != other.rstrip("s")

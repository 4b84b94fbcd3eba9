"""Checks of a training set's captions for the dataset doctor: tags, the trigger word, lengths,
likely typos."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megaman.data.captions import MAX_TOKENS, contains
from megaman.doctor.findings import CheckedImage, Finding, plural, relative_name, shorten

# Words: if the parts of a caption have at least so many (the median), they are sentences, not tags.
MIN_SENTENCE = 5
STOP_WORDS = re.compile(
    r"a|an|the|of|and|or|in|on|at|by|to|with|from|for|is|are|as|its?|his|her|their|this|that"
)
# Letters: one more or less makes another word of many a shorter one.
MIN_TYPO_LENGTH = 5
MIN_FREQUENCY = 5  # of a word to be the correct form of a typo
# If at most this share of the captions lacks what the others begin with, it was forgotten.
RARE_SHARE = 0.1
MIN_CAPTIONS = 3  # for checks of what is in every caption or in one only


def check_captions(
    images: Sequence[CheckedImage], warnings: dict[str, tuple[Path, str]], folder: Path
) -> Iterator[Finding]:
    """Captions that are missing, unusable, shared by several images, or too long.

    warnings has for some images, by path, the caption file and what is odd about it; folder is the
    data folder.
    """
    details = {
        path: f"{relative_name(file, folder)} {text}" for path, (file, text) in warnings.items()
    }
    yield from _missing(images, details)
    yield from _unusable(images, details)
    yield from _odd_encoding(images, details)
    yield from _shared(images)
    yield from _too_long(images)


def _missing(images: Sequence[CheckedImage], warnings: dict[str, str]) -> Iterator[Finding]:
    made = [image for image in images if not image.caption_from_file]
    files = [image.path for image in made if image.path not in warnings]
    if files:
        yield Finding(
            "no_caption",
            True,
            f"{plural(len(files), 'picture')} without a caption",
            "Write what varies into NAME.txt next to each",
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
            "Write what the picture shows into the file",
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


def _shared(images: Sequence[CheckedImage]) -> Iterator[Finding]:
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
        title = f"{plural(len(files), 'picture')} with the same caption as another"
        yield Finding(
            "doubled_caption",
            not everywhere,
            "every picture has the same caption" if everywhere else title,
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
    """Lines of metadata files that could not be used."""
    if warnings:
        texts = [f"{relative_name(file, folder)} {text}" for file, text in warnings]
        title = f"{plural(len(warnings), 'warning')} about metadata files: {shorten(texts, 3)}"
        yield Finding("metadata", True, title, "Fix these lines: they are not used", [])


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
            f"Begin each caption with it, unless the picture shows something other than {trigger}",
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


def check_terms(
    images: Sequence[CheckedImage], term: str, terms: Sequence[Sequence[str]], trigger: str
) -> Iterator[Finding]:
    """Terms that occur twice in a caption, in one caption only, or in all of them; likely typos.

    term and terms are those of `split_terms`, for the images with a written caption.
    """
    written = [image for image in images if image.caption_from_file]
    terms_of = {image.path: words for image, words in zip(written, terms, strict=True)}
    if term == "tags":
        yield from _duplicate_tags(terms_of)
    yield from _typos(written)
    if len(written) >= MIN_CAPTIONS:
        counts = count_terms(terms)
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
    return [" ".join(part.split()) for part in caption.split(",") if part.strip()]


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
    two neighbors.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update({word for word in words_of(caption) if len(word) >= MIN_TYPO_LENGTH})
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

"""What the captions of a training set say, for the dataset doctor: tags, the trigger word, lengths,
likely slips."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megaman.data.captions import MAX_TOKENS, contains
from megaman.doctor.findings import Finding, Picture, relative, several, some

SENTENCE = (
    5  # words: where a caption's parts have as many in the middle, they are sentences and not tags
)
FILLERS = re.compile(
    r"a|an|the|of|and|or|in|on|at|by|to|with|from|for|is|are|as|its?|his|her|their|this|that"
)
SHORTEST_SLIP = 5  # letters: among shorter words one letter more or less is often another word
# where so few captions lack what the others begin with, they were forgotten rather than meant
RARE_LACK = 0.1
OFTEN = 5  # times that a word stands there of which a slip is a slip


def captions(
    pictures: Sequence[Picture], remarks: dict[str, tuple[Path, str]], folder: Path
) -> Iterator[Finding]:
    """Captions that are missing, cannot be used, stand at several pictures, or are too long."""
    missing = [
        picture.path for picture in pictures if not picture.found and picture.path not in remarks
    ]
    useless = [
        picture.path for picture in pictures if not picture.found and picture.path in remarks
    ]
    guessed = [picture.path for picture in pictures if picture.found and picture.path in remarks]
    said = {path: f"{relative(file, folder)} {remark}" for path, (file, remark) in remarks.items()}
    if missing:
        made = {
            picture.path: f"made from its name: {picture.caption}"
            for picture in pictures
            if not picture.found
        }
        yield Finding(
            "no_caption",
            True,
            f"{several(len(missing), 'picture')} without a caption",
            "Write what varies into NAME.txt beside each",
            missing,
            made,
        )
    if useless:
        yield Finding(
            "empty_caption",
            True,
            f"{several(len(useless), 'caption')} empty or not to be read",
            "Write what the picture shows into the file",
            useless,
            said,
        )
    if guessed:
        yield Finding(
            "encoding",
            False,
            f"{several(len(guessed), 'caption')} with a remark",
            "See that the text is right, and save it as UTF-8",
            guessed,
            said,
        )
    shared: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        if picture.found:
            shared[" ".join(picture.caption.casefold().split())].append(picture.path)
    doubled = [path for paths in shared.values() if len(paths) > 1 for path in paths]
    pairs = [
        (paths[0], path, "the same caption") for paths in shared.values() for path in paths[1:]
    ]
    if doubled:
        everywhere = len(shared) == 1 and len(doubled) == len(pictures)
        title = f"{several(len(doubled), 'picture')} with a caption that another one has too"
        title = "every picture has the same caption" if everywhere else title
        yield Finding(
            "doubled_caption",
            not everywhere,
            title,
            "Say what tells them apart; what is not named becomes part of the character",
            doubled,
            {p.path: p.caption for p in pictures},
            pairs,
        )
    lengths = {p.path: estimated_tokens(p.caption) for p in pictures if p.found}
    long = [path for path, length in lengths.items() if length > MAX_TOKENS]
    if long:
        details = {path: f"about {length} tokens" for path, length in lengths.items()}
        yield Finding(
            "long_caption",
            True,
            f"{several(len(long), 'caption')} longer than {MAX_TOKENS} tokens, by estimate",
            "Put what matters first and shorten the rest: what is over is cut off",
            long,
            details,
        )


def metadata(notes: Sequence[tuple[Path, str]], folder: Path) -> Iterator[Finding]:
    """What could not be used of metadata files."""
    if notes:
        told = [f"{relative(file, folder)} {remark}" for file, remark in notes]
        title = f"{several(len(notes), 'remark')} on metadata files: {some(told, 3)}"
        yield Finding("metadata", True, title, "Mend the lines: what they say is not used", [])


def triggers(pictures: Sequence[Picture], trigger: str, inferred: bool) -> Iterator[Finding]:
    """Captions without the trigger words. Those that were inferred may be missing on purpose where
    many lack them."""
    written = [picture for picture in pictures if picture.found]
    lacking = [
        picture.path for picture in written if trigger and not contains(picture.caption, trigger)
    ]
    if lacking:
        wrong = not inferred or len(lacking) <= RARE_LACK * len(written)
        remedy = (
            f"Begin each caption with it, unless the picture shows something else than {trigger}"
        )
        title = f"{several(len(lacking), 'caption')} without the trigger word {trigger!r}"
        yield Finding(
            "no_trigger", wrong, title, remedy, lacking, {p.path: p.caption for p in written}
        )
    elif inferred and not trigger and len(written) > 1:
        yield Finding(
            "no_agreement",
            False,
            "no word that most captions begin with",
            "Begin every caption with the same name for the character: by it you call the LoRA",
            [],
        )


def tags(
    pictures: Sequence[Picture], term: str, of_each: Sequence[Sequence[str]], trigger: str
) -> Iterator[Finding]:
    """Tags (or words) that stand in one caption twice, in one caption only, in all of them; and
    likely slips."""
    written = [picture for picture in pictures if picture.found]
    if term == "tags":
        doubled = {
            p.path: ", ".join(twice)
            for p, own in zip(written, of_each, strict=True)
            if (twice := twice_in_one(own))
        }
        if doubled:
            title = f"{several(len(doubled), 'caption')} with a tag twice"
            yield Finding("tag_twice", True, title, "Keep one of the two", list(doubled), doubled)
    counts = counted(of_each)
    slips = likely_slips([picture.caption for picture in written])
    if slips:
        inside = {p.path: [word for word in words_of(p.caption) if word in slips] for p in written}
        details = {
            p: ", ".join(f"{word} ({slips[word]}?)" for word in words)
            for p, words in inside.items()
            if words
        }
        title = f"{several(len(slips), 'word')} likely mistyped: {some(list(slips))}"
        yield Finding(
            "slips", False, title, "Compare with the word that stands often", list(details), details
        )
    if len(written) < 3:
        return
    known = {trigger.casefold(), *words_of(trigger)}
    always = [
        word
        for word, count in counts.items()
        if count == len(written) and word.casefold() not in known
    ]
    if always:
        yield Finding(
            "in_every",
            False,
            f"{term} in every caption: {some(always)}",
            "Right for what never changes; it becomes part of what the trigger word calls",
            [],
        )
    once = {word for word, count in counts.items() if count == 1}
    if once:
        details = {
            p.path: some([word for word in own if word in once])
            for p, own in zip(written, of_each, strict=True)
        }
        names = [word for word in counts if word in once]
        yield Finding(
            "in_one",
            False,
            f"{term} in one caption only ({len(once)} of {len(counts)}): {some(names)}",
            "Look for slips and for two words for one thing",
            [path for path, words in details.items() if words],
            details,
        )


def words_of(caption: str) -> list[str]:
    """The words of a caption in small letters, without figures."""
    return re.findall(r"[^\W\d_]+", caption.casefold())


def estimated_tokens(caption: str) -> int:
    """About how many tokens CLIP's tokenizer makes of a caption, the two at its ends not counted.

    A rule, so that nothing has to be loaded: every digit and every run of signs is a token and so
    is almost every everyday English word; long and rare ones are taken apart. Of Chinese characters
    each makes three, of other writing beyond Latin each letter one. English tags and sentences came
    out within a fifth of CLIP's own count.
    """
    count = 0
    for piece in re.findall(r"[a-z\u00c0-\u024f]+|\d|[^\w\s]+|\w", caption.casefold()):
        if "\u3400" <= piece <= "\u9fff":
            count += 3
        else:
            count += 1 + (len(piece) > 9) * ((len(piece) - 3) // 7)
    return count


def terms(captions: Sequence[str]) -> tuple[str, list[list[str]]]:
    """ "tags" and the parts of each caption between its commas, or "words" and its words where
    those are sentences."""
    parts = [
        [" ".join(part.split()) for part in caption.split(",") if part.strip()]
        for caption in captions
    ]
    lengths = sorted(len(part.split()) for caption in parts for part in caption)
    if lengths and lengths[len(lengths) // 2] < SENTENCE:
        return "tags", parts
    words = [re.findall(r"\w[\w'-]*", caption.casefold()) for caption in captions]
    return "words", [[word for word in caption if not FILLERS.fullmatch(word)] for caption in words]


def counted(captions_terms: Iterable[Iterable[str]]) -> Counter[str]:
    """In how many captions each term stands, the most frequent first."""
    counts = Counter(term for terms in captions_terms for term in set(terms))
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def twice_in_one(tags: Sequence[str]) -> list[str]:
    """The tags that stand more than once in one caption."""
    return [tag for tag, count in Counter(tag.casefold() for tag in tags).items() if count > 1]


def likely_slips(captions: Iterable[str]) -> dict[str, str]:
    """Words that stand in one caption only and are a letter away from one that stands often: antena
    for antenna.

    Two words are a letter apart where leaving one letter out of either makes them equal, or
    swapping two neighbours.
    """
    counts = Counter(word for caption in captions for word in set(words_of(caption)))
    often = {
        word for word, count in counts.items() if count >= OFTEN and len(word) >= SHORTEST_SLIP
    }
    near: dict[str, set[str]] = defaultdict(set)
    for word in often:
        for form in {word, *_shortened(word)}:
            near[form].add(word)
    slips = {}
    for word in (
        word for word, count in counts.items() if count == 1 and len(word) >= SHORTEST_SLIP
    ):
        meant = {
            other
            for form in {word, *_shortened(word)}
            for other in near.get(form, ())
            if _is_slip(word, other)
        }
        if meant:
            slips[word] = max(sorted(meant), key=counts.__getitem__)
    return slips


def _shortened(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place in range(len(word))]


def _is_slip(word: str, other: str) -> bool:
    """A letter more or less, or two that changed places; a plural is none, nor is one letter for
    another (tower)."""
    if len(word) == len(other):
        return sorted(word) == sorted(other)
    return word.rstrip("s") != other.rstrip("s")

"""Prompts made of a set's captions: for sample images, the model card and generation.

A prompt is what many captions have in common, and a few tags that occur together. It need not be
one of the captions, since a LoRA should generate more than its training images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from megaman.data.captions import COMMON_ENDING, contains, split_tags, trigger_words
from megaman.models.prompt_weights import escape
from megaman.sequences import spread

MEGA_MAN = ("mega man", "megaman", "rock man", "rockman", "洛克人", "ロックマン")
MAX_CAPTIONS = 10_000  # that are looked at
MAX_TAGS = 6  # of a prompt
MIN_SUPPORT = 2  # captions in which a combination of tags has to occur


def names_mega_man(texts: Sequence[str]) -> bool:
    """Whether at least half of the texts name Mega Man."""
    named = [text for text in texts if any(contains(text, name) for name in MEGA_MAN)]
    return bool(texts) and 2 * len(named) >= len(texts)


def make_prompts(captions: Sequence[str], trigger_word: str, count: int) -> list[str]:
    """At most count different prompts about what these captions describe, the most typical first.

    There are none if the captions name Mega Man, for whom the flags' defaults are made, or if
    nobody wrote any and the images' names have no words. Brackets are escaped, since in a prompt
    they would weigh words.
    """
    captions = spread([text for text in captions if text != COMMON_ENDING], MAX_CAPTIONS)
    if not captions or names_mega_man(captions):
        return []
    trigger = trigger_word or trigger_words(captions)
    own = [text for text in captions if not trigger or contains(text, trigger)] or captions
    prompts = [", ".join(tags) for tags in _tag_combinations(own, trigger, count)]
    if len(prompts) < count:
        others = [text for text in dict.fromkeys(own) if text not in prompts]
        prompts += spread(others, count - len(prompts))
    return [escape(prompt) for prompt in prompts]


def make_prompts_from_counts(counts: Mapping[str, int], trigger: str, count: int) -> list[str]:
    """At most count prompts for a LoRA of which only the tags' frequencies are known, as kohya's
    scripts note them; none if they name Mega Man."""
    ranked = [tag for tag, _ in Counter(counts).most_common()]
    most = max(counts.values(), default=0)
    frequent = [tag for tag in ranked if 2 * counts[tag] > most > 1]
    if not (frequent or trigger) or any(names_mega_man([tag]) for tag in [trigger, *frequent]):
        return []
    core = _without_repeats([trigger, *frequent])[: MAX_TAGS - 1]
    others = [tag for tag in ranked if tag not in core and counts[tag] >= MIN_SUPPORT]
    combinations = [[*core, tag] for tag in others[:count]] or [core]
    return [escape(", ".join(tags)) for tags in combinations]


def _without_repeats(tags: Iterable[str]) -> list[str]:
    return [tag for tag in dict.fromkeys(tags) if tag]


def _tag_combinations(captions: Sequence[str], trigger: str, count: int) -> list[list[str]]:
    """Combinations of tags, each with those of most captions and with a first one of its own."""
    tagged = [_without_repeats(split_tags(caption)) for caption in captions]
    counts = Counter(tag for tags in tagged for tag in tags)
    core = [tag for tag, number in counts.most_common() if 2 * number > len(captions) > 1]
    if trigger and not any(contains(tag, trigger) for tag in core):
        core = [*split_tags(trigger), *core]
    core = core[: MAX_TAGS - 1]
    place = _mean_places(tagged)
    used: set[str] = set()
    combinations: list[list[str]] = []
    for first, number in counts.most_common():
        if len(combinations) == count or number < MIN_SUPPORT:
            break
        if first in core or first in used:
            continue
        own = _extend(first, core, tagged, used)
        used.update(own)
        combinations.append(sorted([*core, *own], key=lambda tag: place.get(tag, -1.0)))
    if not combinations and core:
        combinations = [sorted(core, key=lambda tag: place.get(tag, -1.0))]
    return combinations


def _extend(
    first: str, core: Sequence[str], tagged: Sequence[Sequence[str]], used: set[str]
) -> list[str]:
    """A tag and those that most often occur with it; ones that are used already are avoided."""
    chosen = [first]
    while len(core) + len(chosen) < MAX_TAGS:
        fitting = [tags for tags in tagged if set(chosen) <= set(tags)]
        counts = Counter(tag for tags in fitting for tag in tags)
        left = [tag for tag in counts if tag not in core and tag not in chosen]
        frequent = [tag for tag in left if counts[tag] >= MIN_SUPPORT and tag not in used]
        if not frequent:
            break
        chosen.append(max(frequent, key=lambda tag: counts[tag]))
    return chosen


def _mean_places(tagged: Sequence[Sequence[str]]) -> dict[str, float]:
    """Where in its captions each tag stands on average."""
    places: dict[str, list[int]] = {}
    for tags in tagged:
        for place, tag in enumerate(tags):
            places.setdefault(tag, []).append(place)
    return {tag: sum(own) / len(own) for tag, own in places.items()}

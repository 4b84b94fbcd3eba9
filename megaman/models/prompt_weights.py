"""A1111's prompt weights: (word), (word:1.3) and [word]."""

from __future__ import annotations

import re

STEP = 1.1  # what a pair of brackets multiplies or divides by
MAX_WEIGHT = 100.0  # beyond that the embeds would leave the range of fp16
PIECES = re.compile(
    r"""\\(?P<literal>[()\[\]\\]?)      # dropped before other characters, as in A1111
    | (?P<bracket>[()\[\]])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | [^\\()\[\]:]+ | :""",
    re.VERBOSE | re.ASCII,
)
TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)

# What A1111 or its extensions understand and this project does not, by what it is called. Brackets
# behind a backslash are text.
UNSUPPORTED = {
    "a break between chunks": re.compile(r"\bBREAK\b"),
    "a combination of prompts": re.compile(r"\bAND\b"),
    "prompt editing": re.compile(r"(?<!\\)\[[^\[\]]*:\s*\d*\.?\d+\s*\]"),
    "alternating words": re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"),
    "a choice of words": re.compile(r"(?<!\\)\{[^{}]*\}"),
    "a wildcard": re.compile(r"__[\w./*-]+?__"),
    "an embedding": re.compile(r"\bembedding:[^\s,()]+", re.IGNORECASE),
}


def unsupported(prompt: str) -> dict[str, str]:
    """The first example of each kind of syntax in a prompt that is read as plain words."""
    matches = {kind: pattern.search(prompt) for kind, pattern in UNSUPPORTED.items()}
    return {kind: match[0] for kind, match in matches.items() if match}


def parse(prompt: str) -> list[tuple[str, float]]:
    r"""The prompt's parts in order, each with its weight, by the rules of A1111 and kohya's
    scripts.

    (word) weighs 1.1, (word:1.3) 1.3, [word] 1 / 1.1. Nested brackets multiply, brackets that are
    never closed end with the prompt, and closing ones without a partner are text, as are \( \) \[
    \] and \\. Neighbors of equal weight are merged. A1111's tags such as <lora:name:1> are dropped.
    Weights are clamped to 100. Every text is valid; an empty one is [("", 1.0)].
    """
    parts: list[tuple[str, float]] = []
    open_brackets: dict[str, list[int]] = {"(": [], "[": []}  # the index of each one's first part

    def close(bracket: str, factor: float) -> None:
        start = open_brackets[bracket].pop()
        parts[start:] = [(text, _clamped(weight * factor)) for text, weight in parts[start:]]

    for piece in PIECES.finditer(TAG.sub("", prompt)):
        bracket = piece["bracket"]
        if bracket and bracket in "([":
            open_brackets[bracket].append(len(parts))
        elif piece["weight"] and open_brackets["("]:
            close("(", _clamped(float(piece["weight"])))
        elif bracket == ")" and open_brackets["("]:
            close("(", STEP)
        elif bracket == "]" and open_brackets["["]:
            close("[", 1 / STEP)
        else:
            literal = piece["literal"]
            parts.append((piece[0] if literal is None else literal, 1.0))
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while open_brackets[bracket]:
            close(bracket, factor)
    return _merged(parts)


def escape(text: str) -> str:
    """The text as a prompt in which its brackets are brackets, not weights."""
    return re.sub(r"(?<!\\)([()\[\]])", r"\\\1", text)


def _clamped(weight: float) -> float:
    return max(-MAX_WEIGHT, min(weight, MAX_WEIGHT))


def _merged(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The parts with neighbors of equal weight merged, and without empty ones unless all are."""
    merged: list[tuple[str, float]] = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def tags(prompt: str) -> list[str]:
    """A1111's tags in a prompt, such as <lora:name:1>, which parse drops."""
    return TAG.findall(prompt)

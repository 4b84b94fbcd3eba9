"""A1111's prompt weights: (word), (word:1.3) and [word] as parts of a text with a weight each."""

from __future__ import annotations

import re

STEP = 1.1  # what a pair of brackets multiplies or divides by
HEAVIEST = 100.0  # beyond that the states would leave the range of fp16
PIECES = re.compile(
    r"""\\(?P<literal>[()\[\]\\]?)      # a backslash before anything else vanishes, as in A1111
    | (?P<bracket>[()\[\]])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | [^\\()\[\]:]+ | :""",
    re.VERBOSE | re.ASCII,
)
TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)


def parse(prompt: str) -> list[tuple[str, float]]:
    r"""The prompt's parts in order, each with its weight, by the rules of A1111 and kohya's
    scripts.

    (word) weighs 1.1, (word:1.3) 1.3, [word] 1 / 1.1; nested brackets multiply, unclosed ones close
    at the end, others that close nothing are text, and \( \) \[ \] \\ are always text. Neighbours
    of one weight are one part. A1111's tags such as <lora:name:1>, which are no words, are left
    out. A weight is at most 100. No text raises an error; an empty one is [("", 1.0)].
    """
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {
        "(": [],
        "[": [],
    }  # the numbers of the parts that the brackets begin with

    def close(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        parts[start:] = [(text, _clamped(weight * factor)) for text, weight in parts[start:]]

    for piece in PIECES.finditer(TAG.sub("", prompt)):
        bracket = piece["bracket"]
        if bracket and bracket in "([":
            opened[bracket].append(len(parts))
        elif piece["weight"] and opened["("]:
            close("(", _clamped(float(piece["weight"])))
        elif bracket == ")" and opened["("]:
            close("(", STEP)
        elif bracket == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            parts.append((piece[0] if piece["literal"] is None else piece["literal"], 1.0))
    for kind, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[kind]:
            close(kind, factor)
    return _merged(parts)


def _clamped(weight: float) -> float:
    return max(-HEAVIEST, min(weight, HEAVIEST))


def _merged(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight made one part; no part is empty but the only one."""
    merged: list[tuple[str, float]] = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def tags(prompt: str) -> list[str]:
    """A1111's tags in a prompt, such as <lora:name:1>, which parse leaves out: a script should tell
    of them."""
    return TAG.findall(prompt)

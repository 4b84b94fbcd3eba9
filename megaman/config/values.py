"""Parsers of single values, on the command line and in a prompts file.

Each takes the text and returns the value, or raises InvalidValueError with a reason.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

from megaman.config import samplers
from megaman.config.colors import COLORS
from megaman.config.current_folder import RELATIVE, REMEDY, is_deleted
from megaman.files import refused_by_windows, split_strength

WINDOWS = os.name == "nt"
MAX_STRENGTH = 10  # far beyond the strength at which a LoRA yields noise
# What comes along when a path is copied from a window, and is not seen: marks of the direction of
# writing and spaces without a width.
INVISIBLE = "\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
IMAGE_EXTENSION = re.compile(r"(.*\.)?(jpe?g|png|bmp|webp|gif|tiff?|avif|hei[cf])")


class InvalidValueError(Exception):
    """A value that cannot be used; the text is the reason."""


def quote(text: str) -> str:
    """A word as an error message quotes it, at most 60 characters."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def number(
    kind: Callable[[str], Any], low: float, high: float, exclusive: bool = False
) -> Callable[[str], Any]:
    """A parser of an int or float from low to high, low itself excluded if exclusive; never NaN."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise InvalidValueError(f"{quote(text)} is not {expected}") from None
        above = low < value if exclusive else low <= value
        if not above or not value <= high:
            limits = f"{'above' if exclusive else 'at least'} {low}, at most {high}"
            raise InvalidValueError(f"{quote(text)} is out of range: it must be {limits}")
        return value

    return parse


def choice(*words: str) -> Callable[[str], str]:
    """A parser of one of some words, which suggests the nearest for a mistyped one."""

    def parse(text: str) -> str:
        if text in words:
            return text
        suggestion = _suggestion(text, list(words))
        raise InvalidValueError(f"{quote(text)} is none of {', '.join(words)}{suggestion}")

    return parse


def _suggestion(text: str, words: list[str]) -> str:
    near = difflib.get_close_matches(text[:100].lower(), words, n=1)
    return f", did you mean {near[0]}" if near else ""


def sampler(value: str) -> str:
    """The name of a sampler, given any of its names."""
    if found := samplers.find(value):
        return found.name
    names = [entry.name for entry in samplers.SAMPLERS]
    all_names = list(chain.from_iterable(entry.all_names for entry in samplers.SAMPLERS))
    suggestion = _suggestion(value, all_names)
    raise InvalidValueError(f"{quote(value)} is none of {', '.join(names)}{suggestion}")


def text(value: str) -> str:
    """A prompt; bytes that are not UTF-8 arrive as lone surrogates, which no file can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidValueError("the text is not valid UTF-8: save or type it again") from None
    return value


def name(value: str) -> str:
    """A name that is not empty: an empty path would mean the current folder."""
    if not value.strip():
        raise InvalidValueError("the name is empty")
    if "\0" in value:
        raise InvalidValueError("no name can hold a NUL")
    return text(value)


def path(value: str) -> str:
    """A path, see `path_or_name`; a whole one if the current folder has been deleted."""
    place = path_or_name(value)
    if not os.path.isabs(place) and is_deleted():
        raise InvalidValueError(f"{quote(value)} {RELATIVE}: {REMEDY}")
    return place


def path_or_name(value: str) -> str:
    """A path, or the name of a model on the hub or of a checkpoint.

    ~ and ~user are home folders, which shells do not replace in --flag=~/folder; no folder called ~
    is ever made.
    """
    expanded = os.path.expanduser(name(value))
    is_there = os.path.lexists(expanded)
    if not is_there and (_is_blank(value[0]) or _is_blank(value[-1])):
        raise InvalidValueError(f"{quote(value)} begins or ends with a blank: remove it")
    if expanded.startswith("~"):  # unchanged
        home = re.split(r"[/\\]", expanded)[0]
        if home == "~":
            raise InvalidValueError("there is no home folder: write the whole path instead of ~")
        if not is_there:
            raise InvalidValueError(
                f"no user is called {quote(home[1:])}: put ./ in front if {quote(home)} is a folder"
            )
    return text(expanded)


def model_folder(value: str) -> str:
    """A folder on this machine with a model's config.json."""
    folder = path(value)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise InvalidValueError(f"{quote(value)} is no folder with a model (config.json)")
    return folder


def _is_blank(character: str) -> bool:
    return character.isspace() or character in INVISIBLE


def lora(value: str) -> str:
    """PATH or PATH:STRENGTH, as one word."""
    if not os.path.lexists(name(value)):
        value = os.path.expanduser(value)
    place, strength = split_strength(value)
    if abs(strength) > MAX_STRENGTH:
        limits = f"-{MAX_STRENGTH} to {MAX_STRENGTH}"
        raise InvalidValueError(f"a strength of {strength:g} is out of range: {limits}")
    path(place)
    return text(value)


def folder(value: str) -> str:
    """A folder that is created if it is missing; on Windows, one whose name is allowed there."""
    place = path(value)
    if WINDOWS and (part := refused_by_windows(place)):
        raise InvalidValueError(
            f"Windows takes no folder of the name {quote(part)}: choose another"
        )
    return place


def extension(value: str) -> str:
    """The extension of caption files, with or without the dot."""
    is_extension = re.fullmatch(r"\.?\w[\w.-]{0,30}", value, re.ASCII)
    if not is_extension or IMAGE_EXTENSION.fullmatch(value.lower()):
        raise InvalidValueError(f"{quote(value)} is no extension such as .txt")
    return f".{value.removeprefix('.')}"


def color(value: str) -> str:
    """A color as #rrggbb, from its name in CSS or its digits."""
    word = value.strip().lower()
    if named := COLORS.get(word):
        return f"#{named}"
    digits = re.fullmatch(r"#?([0-9a-f]{6}|[0-9a-f]{3})", word)
    if digits is None:
        suggestion = _suggestion(value, list(COLORS))
        expected = "neither a color's name nor #rrggbb"
        raise InvalidValueError(f"{quote(value)} is {expected}{suggestion}")
    if len(digits[1]) == 3:
        return "#" + "".join(2 * digit for digit in digits[1])
    return f"#{digits[1]}"


def pixel_art(value: str) -> str:
    """N or N,PALETTE, as one word: cells on an image's shorter side and the file of a palette."""
    cells, _, palette = value.partition(",")
    count = number(int, 2, 8192)(cells)
    return f"{count},{path(palette)}" if palette else str(count)


def strengths(value: str) -> list[float]:
    """Strengths of a LoRA, separated by commas and without repeats, in the order given."""
    return list(dict.fromkeys(number(float, -10, 10)(part) for part in value.split(",")))


def side(value: str) -> int:
    """A side of an image in pixels, a multiple of 8."""
    pixels = number(int, 8, 8192)(value)
    if pixels % 8:
        near = max(8, round(pixels / 8) * 8)
        raise InvalidValueError(f"{value} is not a multiple of 8: take {near}")
    return pixels


def share_of_images(value: str) -> float:
    """A share between 0 and 1, such as 0.1; both are excluded."""
    if re.fullmatch(r"\d+(\.\d+)?\s*%", value):
        raise InvalidValueError(
            f"{quote(value)} is not a number: write {float(value[:-1]) / 100:g}"
        )
    share = number(float, 0, 1, exclusive=True)(value)
    if share == 1:
        raise InvalidValueError("1 would leave no image to train on: 0.1 is usual")
    return share


def steps_or_auto(value: str) -> int | str:
    """A number of steps, or auto."""
    return value if value == "auto" else COUNT(value)


SEED = number(int, 0, 2**63 - 1)
STEPS = number(int, 1, 999)
GUIDANCE = number(float, 0, 100)
MANY = 10**9  # more steps than any run has; "never" for what happens every so many steps
COUNT = number(int, 1, MANY)
COUNT_OR_ZERO = number(int, 0, MANY)
SHARE = number(float, 0, 0.999999)
PROBABILITY = number(float, 0, 1)
RATE = number(float, 0, 1, exclusive=True)

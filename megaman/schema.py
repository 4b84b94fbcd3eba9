"""Checks for untrusted JSON, composed of small ones.

A check is a function that returns whether a value is valid; it never raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Check = Callable[[Any], bool]
SURROGATES = re.compile("[\ud800-\udfff]")  # they cannot be written as UTF-8


def anything(value: Any) -> bool:
    """Any value."""
    return True


def instance(*kinds: type) -> Check:
    """An instance of one of these types; True and False are ints, as in Python."""
    return lambda value: isinstance(value, kinds)


def whole(low: int, high: int) -> Check:
    """An int from low to high, but not True or False."""
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float, exclusive: bool = False) -> Check:
    """An int or float from low to high, low itself excluded if exclusive; never NaN."""

    def check(value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        return (low < value if exclusive else low <= value) and value <= high

    return check


def text(max_length: int) -> Check:
    """A string of at most max_length characters that can be written to a file."""
    return lambda value: (
        isinstance(value, str) and len(value) <= max_length and not SURROGATES.search(value)
    )


def one_of(*values: Any) -> Check:
    """One of these values, and of the same type."""
    return lambda value: any(
        type(value) is type(allowed) and value == allowed for allowed in values
    )


def list_of(check: Check, least: int = 0, most: int | None = None) -> Check:
    """A list of least to most values, each of which passes the check."""

    def check_list(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < least:
            return False
        return (most is None or len(value) <= most) and all(map(check, value))

    return check_list


def row(*checks: Check) -> Check:
    """A list with one value for each check, which it passes."""

    def check_row(value: Any) -> bool:
        if not isinstance(value, list) or len(value) != len(checks):
            return False
        return all(check(part) for check, part in zip(checks, value, strict=True))

    return check_row


def mapping(check: Check, key: Check = anything, most: int | None = None) -> Check:
    """An object of at most most keys; each key and each value passes its check."""

    def check_mapping(value: Any) -> bool:
        if not isinstance(value, dict) or (most is not None and len(value) > most):
            return False
        return all(map(key, value)) and all(map(check, value.values()))

    return check_mapping


def record(
    checks: Mapping[str, Check],
    optional: Mapping[str, Check] = MappingProxyType({}),
    exact: bool = False,
) -> Check:
    """An object with these keys and perhaps the optional ones, whose values pass their checks.

    Other keys are ignored, or refused if exact.
    """

    def check_record(value: Any) -> bool:
        if not isinstance(value, dict) or not checks.keys() <= value.keys():
            return False
        if exact and not value.keys() <= checks.keys() | optional.keys():
            return False
        present = {name: check for name, check in optional.items() if name in value}
        return first_invalid(value, {**checks, **present}) is None

    return check_record


def first_invalid(content: Mapping[str, Any], checks: Mapping[str, Check]) -> str | None:
    """The first key whose value does not pass its check; a missing value counts as None."""
    return next((name for name, check in checks.items() if not check(content.get(name))), None)

"""Checks of JSON that a stranger may have written, put together from small ones.

A check is a function of a value that says whether it is sound; it never raises, whatever the value
is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Check = Callable[[Any], bool]
SURROGATES = re.compile("[\ud800-\udfff]")  # which no file can hold


def anything(value: Any) -> bool:
    """Whatever it is."""
    return True


def instance(*kinds: type) -> Check:
    """A value of one of these types; True and False are ints too, as in Python."""
    return lambda value: isinstance(value, kinds)


def whole(low: int, high: int) -> Check:
    """An int from low to high, which True is not."""
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float, exclusive: bool = False) -> Check:
    """An int or float from low (itself excluded if exclusive) to high, never NaN."""

    def check(value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        return (low < value if exclusive else low <= value) and value <= high

    return check


def text(max_length: int) -> Check:
    """A text that can be written to a file."""
    return lambda value: (
        isinstance(value, str) and len(value) <= max_length and not SURROGATES.search(value)
    )


def one_of(*values: Any) -> Check:
    """One of these values and of its type."""
    return lambda value: any(
        type(value) is type(allowed) and value == allowed for allowed in values
    )


def list_of(check: Check, least: int = 0, most: int | None = None) -> Check:
    """A list of at least and at most so many values, each of which passes the check."""

    def check_list(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < least:
            return False
        return (most is None or len(value) <= most) and all(map(check, value))

    return check_list


def row(*checks: Check) -> Check:
    """A list with as many values as there are checks, each of which passes its own."""

    def check_row(value: Any) -> bool:
        if not isinstance(value, list) or len(value) != len(checks):
            return False
        return all(check(part) for check, part in zip(checks, value, strict=True))

    return check_row


def mapping(check: Check, key: Check = anything, most: int | None = None) -> Check:
    """An object of at most so many keys, of which each key and each value passes its check."""

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
    """An object with these keys, whose values pass their checks, and with the optional ones if they
    are there.

    Other keys are ignored, or refused if exact.
    """

    def check_record(value: Any) -> bool:
        if not isinstance(value, dict) or not checks.keys() <= value.keys():
            return False
        if exact and not value.keys() <= checks.keys() | optional.keys():
            return False
        present = {name: check for name, check in optional.items() if name in value}
        return first_unsound(value, {**checks, **present}) is None

    return check_record


def first_unsound(content: Mapping[str, Any], checks: Mapping[str, Check]) -> str | None:
    """The first of the checked keys whose value is not what it can be; a missing one counts as
    None."""
    return next((name for name, check in checks.items() if not check(content.get(name))), None)

"""The checks of JSON that a stranger may have written: what they let through, and that nothing
makes them raise."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman import schema

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
)
JSON = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
)
CHECKS = {
    "anything": schema.anything,
    "instance": schema.instance(int, str),
    "whole": schema.whole(-3, 9),
    "number": schema.number(0, 2.5),
    "text": schema.text(4),
    "one of": schema.one_of("a", 1, True),
    "list of": schema.list_of(schema.whole(0, 5), least=1, most=3),
    "row": schema.row(schema.text(3), schema.whole(0, 5)),
    "mapping": schema.mapping(schema.text(2), schema.text(1), most=2),
    "record": schema.record({"a": schema.whole(0, 5)}, {"b": schema.text(1)}),
    "exact": schema.record({"a": schema.whole(0, 5)}, {"b": schema.text(1)}, exact=True),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@given(value=JSON)
def test_a_check_says_yes_or_no_of_whatever_it_meets(check, value):
    assert check(value) in (True, False)
    assert schema.first_invalid({"name": value}, {"name": check}) == (
        None if check(value) else "name"
    )


@given(JSON, st.integers(), st.integers())
def test_a_whole_number_is_an_int_within_its_limits(value, low, high):
    wanted = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    assert schema.whole(low, high)(value) == wanted


@given(JSON | st.floats(-1, 1), st.booleans())
def test_a_number_is_neither_nan_nor_true(value, exclusive):
    sound = schema.number(0, 1, exclusive)(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        assert not sound
    else:
        assert sound == (0 <= value <= 1 and not (exclusive and value == 0))


@given(st.text(st.characters(), max_size=6) | JSON)
def test_a_text_can_be_written(value):
    if schema.text(5)(value):
        assert len(value) <= 5
        value.encode("utf-8")
    else:
        assert (
            not isinstance(value, str)
            or len(value) > 5
            or any("\ud800" <= mark <= "\udfff" for mark in value)
        )


@given(JSON)
def test_one_of_some_values_has_their_type_too(value):
    assert schema.one_of(1, "a")(value) == (value in (1, "a") and type(value) in (int, str))
    assert not schema.one_of(1)(True) and not schema.one_of(True)(1) and not schema.one_of(1)(1.0)


@given(st.lists(st.integers(0, 9), max_size=6))
def test_a_list_has_its_length_and_each_of_its_values_passes(values):
    check = schema.list_of(schema.whole(0, 5), least=1, most=4)
    assert check(values) == (1 <= len(values) <= 4 and all(value <= 5 for value in values))
    assert schema.row(*[schema.whole(0, 5)] * 3)(values) == (
        len(values) == 3 and all(value <= 5 for value in values)
    )
    assert not check(tuple(values)), "JSON has lists"


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)))
def test_a_record_has_its_keys_and_may_have_others_unless_it_is_exact(content):
    checks, optional = {"a": schema.whole(0, 5)}, {"b": schema.whole(0, 5)}
    sound = content.get("a", 9) <= 5 and content.get("b", 0) <= 5
    assert schema.record(checks, optional)(content) == sound
    assert schema.record(checks, optional, exact=True)(content) == (sound and "c" not in content)


@given(st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=4))
def test_a_mapping_has_sound_keys_and_values(content):
    wanted = len(content) <= 3 and all(
        len(name) <= 1 and value <= 5 for name, value in content.items()
    )
    assert schema.mapping(schema.whole(0, 5), schema.text(1), most=3)(content) == wanted


def test_the_first_that_is_not_sound_is_named():
    checks = {"a": schema.whole(0, 5), "b": schema.text(3), "c": schema.instance(type(None))}
    assert schema.first_invalid({"a": 1, "b": "x"}, checks) is None, "a missing one counts as None"
    assert schema.first_invalid({"a": 9, "b": 9}, checks) == "a"
    assert schema.first_invalid({"a": 1}, checks) == "b"

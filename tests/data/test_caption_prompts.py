"""Prompts made of captions: about the set's own character, plausible, and several if need be."""

from __future__ import annotations

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from megaman.data.caption_prompts import (
    MAX_TAGS,
    make_prompts,
    make_prompts_from_counts,
    names_mega_man,
)
from megaman.data.captions import COMMON_ENDING, split_tags
from megaman.models.prompt_weights import escape, parse

CAPTIONS = [
    "pix, green cat, sitting, hat",
    "pix, green cat, running",
    "pix, green cat, sitting",
    "pix, green cat, running, tree",
    "a dog, tree",
]


def test_prompts_have_what_most_captions_share_and_tags_that_occur_together():
    first, second, *others = make_prompts(CAPTIONS, "", 4)
    assert (first, second) == ("pix, green cat, sitting", "pix, green cat, running")
    assert all(prompt.startswith("pix, green cat") for prompt in others)


def test_the_demos_captions_give_ten_different_prompts_about_its_hero():
    files = sorted((ROOT / "demo" / "images").glob("*.txt"))
    captions = [path.read_text(encoding="utf-8").strip() for path in files]
    prompts = make_prompts(captions, "", 10)
    assert len(set(prompts)) == 10
    assert all(prompt.startswith("volto, blue robot hero, pixel art, ") for prompt in prompts)
    assert not set(prompts) & set(captions), "a LoRA should generate more than its captions"


def test_sentences_are_prompts_themselves():
    captions = ["A photo of a sks dog.", "a sks dog in the snow", "my sks dog (asleep)"]
    assert make_prompts(captions, "", 4) == [*captions[:2], r"my sks dog \(asleep\)"]


@pytest.mark.parametrize(
    ("captions", "trigger", "prompts"),
    [
        ([], "", []),
        ([COMMON_ENDING] * 4, "", []),
        ([f"zeb, {COMMON_ENDING}"] * 4, "zeb", [f"zeb, {COMMON_ENDING}"]),
        ([f"goku, {COMMON_ENDING}"] * 4, "", [f"goku, {COMMON_ENDING}"]),
        (["mega man, running", "Rockman, jumping", "a boss"], "", []),
        (["洛克人, 跑步"] * 3, "", []),
    ],
)
def test_mega_man_and_sets_without_words_leave_it_to_the_defaults(captions, trigger, prompts):
    assert make_prompts(captions, trigger, 4) == prompts


def test_mega_man_is_named_by_half_of_the_texts():
    assert names_mega_man(["mega man", "a cat"]) and not names_mega_man(["a cat", "b", "megaman"])
    assert not names_mega_man(["omega mania"])


@pytest.mark.parametrize(
    ("counts", "trigger", "prompts"),
    [
        ({}, "", []),
        ({"a long sentence": 1, "another": 1}, "", []),
        ({"a long sentence": 1}, "pix", ["pix"]),
        ({"pix": 9, "cat": 8, "hat (blue)": 3, "x": 1}, "", [r"pix, cat, hat \(blue\)"]),
        ({"mega man": 9, "x": 2}, "", []),
    ],
)
def test_a_table_of_tags_gives_prompts_too(counts, trigger, prompts):
    assert make_prompts_from_counts(counts, trigger, 10) == prompts


@given(st.lists(st.text(alphabet="ab (),[]", max_size=12), max_size=8), st.integers(1, 6))
def test_whatever_the_captions_are(captions, count):
    prompts = make_prompts(captions, "", count)
    assert len(prompts) <= count
    for prompt in prompts:
        whole_caption = prompt in map(escape, captions)
        assert whole_caption or len(split_tags(prompt)) <= MAX_TAGS


@given(st.text(alphabet="a()[] ,"))
def test_an_escaped_text_has_no_weights(text):
    assert parse(escape(text)) == [(text, 1.0)]

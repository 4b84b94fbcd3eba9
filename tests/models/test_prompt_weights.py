"""A1111's prompt weights: its own examples, and its published rules written a second way."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.models.prompt_weights import MAX_WEIGHT, parse, tags


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("", [("", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("a (robot:1.3), blue", [("a ", 1.0), ("robot", 1.3), (", blue", 1.0)]),
        ("((robot))", [("robot", 1.1 * 1.1)]),
        ("[robot]", [("robot", 1 / 1.1)]),
        ("(robot: +.5 )", [("robot", 0.5)]),
        ("(robot:-1)", [("robot", -1.0)]),
        ("(robot:0)", [("robot", 0.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced", [("unbalanced", 1 / 1.1)]),
        ("a) b] c:1.3)", [("a) b] c:1.3)", 1.0)]),
        (r"\(literal\) \[x\] \\", [(r"(literal) [x] \ "[:-1], 1.0)]),
        (
            r"mega man \(character\), (arm \(left\):1.2)",
            [("mega man (character), ", 1.0), ("arm (left)", 1.2)],
        ),
        (r"a\b", [("ab", 1.0)]),
        ("a\\", [("a", 1.0)]),
        ("(same)(weight)", [("sameweight", 1.1)]),
        ("ratio 3:4", [("ratio 3:4", 1.0)]),
        ("(ratio 3:4 and more)", [("ratio 3:4 and more", 1.1)]),
        ("(x:1.2.3)", [("x:1.2.3", 1.1)]),
        ("(x:１.2)", [("x:１.2", 1.1)]),
        ("()", [("", 1.0)]),
        ("(a:1.5)()[](b:1.5)", [("ab", 1.5)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2 * 1.1), (" c", 1.1)]),
        ("(洛克人:1.2) 藍色", [("洛克人", 1.2), (" 藍色", 1.0)]),
        ("(x:99999)", [("x", MAX_WEIGHT)]),
        ("(x:-" + "9" * 400 + ")", [("x", -MAX_WEIGHT)]),
        ("(" * 9000 + "x", [("x", MAX_WEIGHT)]),
        (
            "(" * 9000 + "x" + ")" * 9000 + ", (" + "(x:9" + "9" * 400 + "):0)",
            [("x", MAX_WEIGHT), (", ", 1.0), ("x", 0)],
        ),
    ],
)
def test_by_example(prompt, wanted):
    parsed = parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in wanted]
    assert [weight for _, weight in parsed] == pytest.approx(
        [weight for _, weight in wanted], rel=1e-12
    )


def test_the_example_of_a1111s_own_documentation():
    parsed = parse("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).")
    wanted = [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ]
    assert [text for text, _ in parsed] == [text for text, _ in wanted]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in wanted])


def test_tags_are_no_words():
    prompt = "a robot <lora:mega_man-v1:0.8>, (blue <LyCO:x>:1.2) <hypernet:y:1> <3 <b> a:<c>"
    assert tags(prompt) == ["<lora:mega_man-v1:0.8>", "<LyCO:x>", "<hypernet:y:1>"]
    assert parse(prompt) == [("a robot , ", 1.0), ("blue ", 1.2), ("  <3 <b> a:<c>", 1.0)]
    assert tags("a robot") == []


plain = st.text(st.characters(exclude_characters="()[]\\<")).filter(bool)
# A prompt as a tree: text, or a bracket with what it holds and its weight (None: as many brackets
# say).
tree = st.recursive(
    st.text(
        st.characters(exclude_characters="()[]\\<:")
    ),  # a colon may begin the weight of the bracket around it
    lambda inner: st.tuples(
        st.sampled_from(["(", "["]) | st.floats(0.1, 3).map(lambda weight: round(weight, 2)),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def write(node) -> str:
    if isinstance(node, str):
        return node
    kind, inner = node
    text = "".join(map(write, inner))
    return {"(": f"({text})", "[": f"[{text}]"}.get(kind, f"({text}:{kind})")


def weigh(node, factor: float = 1.0) -> list[tuple[str, float]]:
    if isinstance(node, str):
        return [(letter, factor) for letter in node]
    kind, inner = node
    factor *= {"(": 1.1, "[": 1 / 1.1}.get(kind, kind if isinstance(kind, float) else 1.0)
    return list(chain.from_iterable(weigh(child, factor) for child in inner))


@given(st.lists(tree, min_size=1, max_size=4))
def test_every_letter_has_the_product_of_the_brackets_around_it(nodes):
    wanted = list(chain.from_iterable(map(weigh, nodes)))
    parsed = parse("".join(map(write, nodes)))
    found = list(
        chain.from_iterable(((letter, weight) for letter in text) for text, weight in parsed)
    )
    assert [letter for letter, _ in found] == [letter for letter, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx(
        [weight for _, weight in wanted], rel=1e-9
    )


@given(plain)
def test_a_plain_prompt_is_one_part(prompt):
    assert parse(prompt) == [(prompt, 1.0)]


@given(plain)
def test_escaped_brackets_come_back(prompt):
    text = f"({prompt}) [{prompt}] \\"
    escaped = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in text)
    assert parse(escaped) == [(text, 1.0)]


PIECES = [
    "(",
    ")",
    "[",
    "]",
    "\\",
    ":",
    ":1.3)",
    ": -2 )",
    ":.)",
    "word",
    " ",
    "<lora:a:1>",
    "<lora:",
    ">",
    "\n",
    "洛",
]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join) | st.text(max_size=60))
def test_anything_is_parsed(prompt):
    parsed = parse(prompt)
    assert parsed
    assert all(isinstance(text, str) and abs(weight) <= MAX_WEIGHT for text, weight in parsed)
    assert parsed == [("", 1.0)] or all(text for text, _ in parsed)
    assert all(first[1] != second[1] for first, second in pairwise(parsed))
    if not tags(prompt):
        left = iter(prompt)
        assert all(letter in left for letter in "".join(text for text, _ in parsed)), (
            "in order, and nothing is made up"
        )

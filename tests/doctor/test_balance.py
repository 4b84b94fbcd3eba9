"""The doctor's remarks on what a set shows how often, by its captions' own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaman.doctor.balance_checks import check_balance, common_phrase, value_in
from megaman.doctor.findings import CheckedImage, Finding


def findings(captions: list[str], trigger: str = "volto") -> dict[str, Finding]:
    images = [
        CheckedImage(f"{number}.png", Path(f"{number}.png"), caption, caption_from_file=True)
        for number, caption in enumerate(captions)
    ]
    return {finding.kind: finding for finding in check_balance(images, trigger)}


def test_a_set_that_faces_one_way():
    captions = [f"volto, running, facing left, place {number}" for number in range(27)]
    captions += ["volto, standing, front view"] * 3
    found = findings(captions)
    title = found["balance_direction"].title
    assert title == "27 captions name a direction: left 27; none right"
    assert len(found["balance_direction"].files) == 27
    assert found["balance_view"].title.endswith("side view 27, front view 3; none back view")
    assert not any(finding.is_wrong for finding in found.values())


def test_a_balanced_set_gets_no_remark():
    views = ["front view", "facing left", "facing right", "back view"]
    poses = ["standing", "running", "jumping"]
    captions = [
        f"volto, {views[i % 4]}, {poses[i % 3]}, place {'abcdefghijkl'[i]}" for i in range(12)
    ]
    assert findings(captions) == {}


def test_what_no_caption_names():
    found = findings([f"volto, blue robot {number}" for number in range(10)])
    assert found["balance_unnamed"].title == "none of 10 captions names a view or a pose"
    assert findings(["volto, blue robot"] * 9) == {}, "too few to say anything"


def test_a_captioners_opening():
    captions = [f"there is a cartoon image of a robot on a {word}" for word in "abcdefghi"]
    found = findings([*captions, "a robot runs"])
    assert found["in_nearly_all"].title == (
        "9 of 10 captions contain 'there is a cartoon image of a robot on a'"
    )
    assert found["in_nearly_all"].files == ["9.png"]
    assert common_phrase([["volto", "robot"]] * 9 + [["x"]], {"volto", "robot"}) == ()


@pytest.mark.parametrize(
    ("caption", "kind", "value"),
    [
        ("a robot facing to the left", "a direction", "left"),
        ("looking right, smiling", "a direction", "right"),
        ("arm cannon on the left arm", "a direction", None),
        ("洛克人, 向左, 站立", "a direction", "left"),
        ("洛克人, 向左, 站立", "a pose", "standing"),
        ("seen from behind", "a view", "back view"),
        ("three-quarter view", "a view", "three-quarter view"),
        ("close-up of a face", "a framing", "portrait"),
        ("a runner in the background", "a pose", None),
        ("brunning", "a pose", None),
    ],
)
def test_words_of_a_caption(caption, kind, value):
    assert value_in(caption, kind) == value

"""The parameters text of a PNG is what A1111's own expression reads, whatever stands in the
prompt."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megaman.sampling.png import a1111_text, save_png, save_thumbnail

A1111_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

line = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\u2028\u2029\x85"),
    max_size=60,
)
VALUES = {"Steps": 20, "Sampler": "DPM++ 2M", "CFG scale": "7", "Seed": 5, "Size": "512x512"}


@pytest.mark.parametrize(
    ("size", "small"), [((512, 512), (256, 256)), ((768, 512), (256, 171)), ((300, 64), None)]
)
def test_a_thumbnail_of_large_pictures_alone(tmp_path, size, small):
    image = Image.new("RGB", size, "navy")
    save_thumbnail(tmp_path / "small" / "a.webp", image)
    assert image.size == size
    made = tmp_path / "small" / "a.webp"
    assert (Image.open(made).size if made.exists() else None) == small


def read_pairs(text: str) -> dict[str, str]:
    """The settings of the last line, as A1111 reads them: quoted values are JSON."""
    pairs = A1111_PAIR.findall(text.split("\n")[-1])
    return {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


@given(prompt=line, negative=line, model=line.map(str.strip).filter(bool))
def test_a1111_reads_it_back(prompt, negative, model):
    text = a1111_text(prompt, negative, {**VALUES, "Model": model})
    pairs = read_pairs(text)
    assert pairs == {**{name: str(value) for name, value in VALUES.items()}, "Model": model}
    head = text.split("\n")[:-1]
    assert head[0] == prompt
    assert head[1:] == ([f"Negative prompt: {negative}"] if negative else [])


def test_values_with_marks_are_quoted():
    text = a1111_text("p", "", {"Model": 'a, b: "c"\nd', "Steps": 1})
    assert text == 'p\nModel: "a, b: \\"c\\"\\nd", Steps: 1'


def test_the_picture_carries_it(tmp_path):
    prompt = "洛克人, 🤖 <lora:x:1>, “quotes”"
    text = a1111_text(prompt, "blurry", VALUES)
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8), "red"), text)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"] == text
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

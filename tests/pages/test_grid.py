"""A comparison as one picture: sizes stay within bounds, any label can be written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megaman.pages.grid import GAP, MARGIN, MAX_SIDE, save_grid


def picture(folder, size):
    file = folder / "picture.png"
    Image.new("RGB", size, (200, 30, 60)).save(file)
    return file


@pytest.mark.parametrize(
    ("size", "cell"),
    [
        ((64, 64), (256, 256)),
        ((48, 96), (96, 192)),
        ((512, 512), (256, 256)),
        ((768, 512), (256, 171)),
    ],
)
def test_small_pictures_grow_in_whole_steps_and_large_ones_shrink(tmp_path, size, cell):
    save_grid(tmp_path / "grid.png", ["a", "b"], [("row", [picture(tmp_path, size)] * 2)])
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width == MARGIN + 2 * (cell[0] + GAP)
    red = grid.point(lambda value: 255 if value == 200 else 0).getchannel("R")
    box = red.crop((MARGIN, 40, MARGIN + cell[0] + GAP // 2, grid.height)).getbbox()
    assert box
    left, top, right, bottom = box
    assert (right - left, bottom - top) == cell


def test_a_long_comparison_stays_within_bounds(tmp_path):
    save_grid(
        tmp_path / "grid.png", ["a"], [(str(i), [picture(tmp_path, (64, 64))]) for i in range(200)]
    )
    assert max(Image.open(tmp_path / "grid.png").size) <= MAX_SIDE


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_any_label_can_be_written(tmp_path_factory, column, row):
    folder = tmp_path_factory.mktemp("grid")
    save_grid(folder / "grid.png", [column], [(row, [picture(folder, (64, 64))])])
    assert {path.name for path in folder.iterdir()} == {"grid.png", "picture.png"}

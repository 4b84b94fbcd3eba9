"""The least is given up so that drawing fits: fewer images at once, tiles, turns, in that order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaman import runtime
from megaman.errors import UserError
from megaman.models.base import load_base
from megaman.sampling import generator
from megaman.sampling.generator import Room, make_room

GB = 10**9
SD15 = (1.72 * GB, 0.33 * GB, 0.25 * GB)  # bytes of fp16 weights, the VAE in float32
PASSES = (0.21 * GB, 1.07 * GB, 1.07 * GB)  # an image of 512 px
LARGE = (0.48 * GB, 2.42 * GB, 1.07 * GB)  # one of 768 px


@pytest.mark.parametrize(
    ("free", "passes", "batch", "wanted"),
    [
        (24 * GB, PASSES, 4, (4, False, False)),
        (6 * GB, PASSES, 1, (1, False, False)),
        (4.2 * GB, PASSES, 8, (4, False, False)),
        (6.5 * GB, LARGE, 1, (1, False, False)),
        (4.5 * GB, LARGE, 1, (1, True, False)),
        (3 * GB, PASSES, 1, (1, False, True)),
        (3 * GB, LARGE, 1, (1, True, True)),
        (1 * GB, LARGE, 4, (1, True, True)),
    ],
)
def test_what_is_given_up(free, passes, batch, wanted):
    space = make_room(int(free), SD15, passes, 512 * 512, batch, can_wait=True)
    assert (space.pixels // space.largest, space.tiling, space.turns) == wanted


def test_on_a_cpu_no_model_leaves_the_device():
    assert not make_room(GB, SD15, LARGE, 512 * 512, 4, can_wait=False).turns


@given(st.integers(1, 2**40), st.integers(1, 64), st.booleans())
def test_more_memory_never_gives_less_room(free, batch, can_wait):
    less, more = (
        make_room(each, SD15, LARGE, 512 * 512, batch, can_wait) for each in (free, 2 * free)
    )
    assert (less.turns, less.tiling, -less.pixels) >= (more.turns, more.tiling, -more.pixels)


def test_a_room_gets_tighter_step_by_step_and_then_says_no():
    space = Room(pixels=3 * 64 * 64, largest=64 * 64)
    assert (
        space.at_once(64, 64) == 3 and space.at_once(32, 32) == 12 and space.at_once(512, 512) == 1
    )
    seen = []
    with pytest.raises(UserError, match="--height"):
        while True:
            space.tighten()
            seen.append((space.at_once(64, 64), space.tiling, space.turns))
    assert seen == [(1, False, False), (1, True, False), (1, True, True)]


def test_the_figures_of_a_base(base_folder):
    base = load_base(str(base_folder), torch.float32)
    assert runtime.parameter_bytes(base.unet) == 4 * base.unet.num_parameters()
    small, large = (
        generator.pass_sizes(base.unet, base.vae, pixels, base.vae_scale_factor)
        for pixels in (64 * 64, 128 * 128)
    )
    assert [b / a for a, b in zip(small, large, strict=True)] == [4, 4, 1]
    assert 0 < runtime.free_memory(torch.device("cpu")) < 2**50

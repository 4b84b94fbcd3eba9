"""Buckets: no side off the step, no area beyond the limit, the nearest shape for every image."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaman.data.buckets import Buckets, make_buckets, summary
from megaman.errors import UserError

SD15 = make_buckets(512, 512, None, None, None, True)
SIDE = st.integers(16, 5000)
SIZES = st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=40)
GRAINS = st.integers(1, 16).map(lambda value: 8 * value)


@st.composite
def bucket_settings(draw) -> Buckets:
    """Any settings that are not refused."""
    resolution, native = draw(GRAINS) * 4, draw(st.sampled_from([64, 512]))
    smallest = draw(st.none() | GRAINS.filter(lambda side: side <= resolution))
    largest = draw(st.none() | GRAINS.map(lambda side: resolution + side))
    step = draw(st.none() | GRAINS.filter(lambda side: side <= resolution))
    return make_buckets(resolution, native, smallest, largest, step, draw(st.booleans()))


def test_the_defaults_are_kohyas_for_stable_diffusion_and_scale_with_the_base():
    assert (SD15.step, SD15.largest, SD15.area) == (64, 1024, 512 * 512)
    tall = [(256, 1024), (320, 768), (384, 640), (448, 576)]
    assert set(SD15.sizes) == {*tall, (512, 512), *((height, width) for width, height in tall)}
    demo = make_buckets(64, 64, None, None, None, True)
    assert demo.sizes == tuple((width // 8, height // 8) for width, height in SD15.sizes)


@given(bucket_settings(), SIZES)
def test_every_side_is_on_the_step_and_every_area_within_the_limit(buckets, sizes):
    for width, height in [*buckets.sizes, *(buckets.size_for(*size) for size in sizes)]:
        assert width % buckets.step == height % buckets.step == 0
        assert 0 < width * height <= buckets.area
        assert max(width, height) <= buckets.largest
    assert {(height, width) for width, height in buckets.sizes} == set(buckets.sizes), (
        "tall and wide are alike"
    )


@given(bucket_settings(), SIDE, SIDE)
def test_the_bucket_is_the_one_that_loses_least(buckets, width, height):
    chosen = buckets.size_for(width, height)
    assert buckets.size_for(height, width) == chosen[::-1]
    if chosen not in buckets.sizes:
        assert not buckets.upscale
        return

    def distance(size):
        return abs(math.log(width / height) - math.log(size[0] / size[1]))

    assert distance(chosen) <= min(map(distance, buckets.sizes)) + 1e-9


@given(bucket_settings(), SIDE, SIDE)
def test_without_upscale_nothing_is_enlarged_but_sides_below_a_step(buckets, width, height):
    small = dataclasses.replace(buckets, upscale=False)
    chosen = small.size_for(width, height)
    if min(width, height) >= buckets.step:
        assert chosen[0] <= width and chosen[1] <= height
    if (
        max(width, height) <= buckets.largest
        and width * height <= buckets.area
        and chosen not in buckets.sizes
    ):
        floored = tuple(
            max(buckets.step, side // buckets.step * buckets.step) for side in (width, height)
        )
        assert chosen == floored or floored[0] * floored[1] > buckets.area


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((600, 1800), (320, 768)),
        ((1800, 600), (768, 320)),
        ((100, 1000), (256, 1024)),
        ((300, 310), (512, 512)),
        ((3000, 4000), (448, 576)),
    ],
)
def test_buckets_of_some_sizes(size, bucket):
    assert SD15.size_for(*size) == bucket


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((300, 310), (256, 256)),
        ((200, 500), (192, 448)),
        ((3000, 4000), (448, 576)),
        ((40, 90), (64, 64)),
    ],
)
def test_small_pictures_without_upscale(size, bucket):
    assert make_buckets(512, 512, None, None, None, False).size_for(*size) == bucket


@pytest.mark.parametrize(
    ("limits", "flag"),
    [
        ((520, None, None), "min_bucket_reso"),
        ((None, 448, None), "max_bucket_reso"),
        ((None, None, 520), "bucket_reso_steps"),
    ],
)
def test_limits_that_leave_no_room(limits, flag):
    with pytest.raises(UserError, match=f"--{flag} "):
        smallest, largest, step = limits
        make_buckets(512, 512, smallest, largest, step, True)


def test_the_square_is_there_whatever_the_limits():
    assert make_buckets(512, 512, 512, 512, 384, True).sizes == ((384, 384),)


def test_the_line_of_the_buckets():
    assert summary([(64, 64), (32, 128), (64, 64)]) == "64x64: 2, 32x128: 1"
    assert summary((8 * side, 8) for side in range(1, 30)).endswith("96x8: 1 and 17 more")

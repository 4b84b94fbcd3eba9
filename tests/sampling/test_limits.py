"""Only what is needed is given up so that generation fits: fewer images at once, tiles, offload."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaman import runtime
from megaman.errors import UserError
from megaman.models.base import load_base
from megaman.models.vae_tiling import tile_side
from megaman.sampling.limits import MemoryNeeds, SamplingLimits, measure_needs, plan_limits

GB = 10**9
# Bytes of Stable Diffusion 1.5 with fp16 weights, the VAE in float32; an image of 512 px.
SMALL = MemoryNeeds(
    unet=int(1.72 * GB),
    vae=int(0.33 * GB),
    text_encoder=int(0.25 * GB),
    unet_pass=int(0.21 * GB),
    decode=int(1.07 * GB),
    decode_tile=int(1.07 * GB),
)
LARGE = replace(SMALL, unet_pass=int(0.48 * GB), decode=int(2.42 * GB))  # an image of 768 px


@pytest.mark.parametrize(
    ("free", "needs", "batch_size", "expected"),
    [
        (24 * GB, SMALL, 4, (4, False, False)),
        (6 * GB, SMALL, 1, (1, False, False)),
        (4.2 * GB, SMALL, 8, (4, False, False)),
        (6.5 * GB, LARGE, 1, (1, False, False)),
        (4.5 * GB, LARGE, 1, (1, True, False)),
        (3 * GB, SMALL, 1, (1, False, True)),
        (3 * GB, LARGE, 1, (1, True, True)),
        (1 * GB, LARGE, 4, (1, True, True)),
    ],
)
def test_what_is_given_up(free, needs, batch_size, expected):
    limits = plan_limits(int(free), needs, 512 * 512, batch_size, can_offload=True)
    assert (limits.pixels // limits.largest, limits.tiling, limits.offload) == expected


def test_on_a_cpu_no_model_leaves_the_device():
    assert not plan_limits(GB, LARGE, 512 * 512, 4, can_offload=False).offload


@given(st.integers(1, 2**40), st.integers(1, 64), st.booleans())
def test_more_memory_never_tightens_the_limits(free, batch_size, can_offload):
    less, more = (
        plan_limits(each, LARGE, 512 * 512, batch_size, can_offload) for each in (free, 2 * free)
    )
    assert (less.offload, less.tiling, -less.pixels) >= (more.offload, more.tiling, -more.pixels)


def test_limits_get_tighter_step_by_step_and_then_refuse():
    limits = SamplingLimits(pixels=3 * 64 * 64, largest=64 * 64)
    assert limits.batch_size(64, 64) == 3
    assert limits.batch_size(32, 32) == 12
    assert limits.batch_size(512, 512) == 1
    seen = []
    with pytest.raises(UserError, match="--height"):
        while True:
            limits.reduce()
            seen.append((limits.batch_size(64, 64), limits.tiling, limits.offload))
    assert seen == [(1, False, False), (1, True, False), (1, True, True)]


@pytest.mark.parametrize(
    ("own", "side", "tile"),
    [(512, 512, 256), (512, 2048, 512), (512, 300, 144), (64, 64, 32), (64, 8, 16)],
)
def test_the_side_of_a_tile(own, side, tile):
    """Half an image's side, at most the VAE's own, and two latents at least."""
    assert tile_side(own, side, 8) == tile


def test_the_figures_of_a_base(base_folder):
    base = load_base(str(base_folder), torch.float32)
    assert runtime.parameter_bytes(base.unet) == 4 * base.unet.num_parameters()
    small, large = (measure_needs(base, pixels) for pixels in (64 * 64, 128 * 128))
    assert large == replace(
        small,
        unet_pass=4 * small.unet_pass,
        decode=4 * small.decode,
        decode_tile=4 * small.decode_tile,
    )
    assert small.decode_tile * 4 == small.decode
    assert 0 < runtime.free_memory(torch.device("cpu")) < 2**50

"""A sampler is found by all its names, and generates what diffusers' pipeline generates with it."""

from __future__ import annotations

from itertools import chain

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

from megaman.config import samplers
from megaman.config.samplers import SAMPLERS, find
from megaman.models.base import load_base
from megaman.models.text_encoding import encode_captions
from megaman.sampling import denoise


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("DPM++ 2M", "dpm++_2m"),
        ("dpm++_2m", "dpm++_2m"),
        ("dpmsolver++", "dpm++_2m"),
        ("DPMSolverMultistepScheduler", "dpm++_2m"),
        ("DPM++ 2M Karras", "dpm++_2m_karras"),
        ("Euler a", "euler_a"),
        ("k_euler_a", "euler_a"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("k_dpm_2", "dpm2"),
        ("dpm_2_a", "dpm2_a"),
        ("PLMS", "pndm"),
        ("DDIM", "ddim"),
        ("UniPC", "unipc"),
        ("LCM", "lcm"),
    ],
)
def test_the_usual_names(word, name):
    sampler = find(word)
    assert sampler and sampler.name == name


def test_each_name_means_one_sampler_and_each_class_exists():
    names = list(chain.from_iterable((each.name, *each.aliases) for each in SAMPLERS))
    assert len(names) == len(set(names))
    for each in SAMPLERS:
        words = {each.name, each.title, *each.aliases, each.name.upper()}
        assert all(find(word) is each for word in words)
        assert hasattr(diffusers, each.scheduler)


@given(st.text(max_size=30))
def test_any_text_is_a_sampler_or_none(text):
    found = find(text)
    assert found is None or found in SAMPLERS


@pytest.fixture(scope="module")
def side_by_side(base_folder):
    pipe = StableDiffusionPipeline.from_pretrained(base_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return load_base(str(base_folder), torch.float32), pipe


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_it_draws_what_the_pipeline_draws(side_by_side, sampler):
    """The same noise, the added one too: two images at once, each with its own seed."""
    base, pipe = side_by_side
    prompts = {"prompt": ["a blue robot"] * 2, "negative_prompt": ["blurry"] * 2}
    text, negative = pipe.encode_prompt(
        device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **prompts
    )
    pipe.scheduler = denoise.make_sampler(base.noise_scheduler, sampler)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    settings = {
        "height": 32,
        "width": 32,
        "num_inference_steps": 5,
        "guidance_scale": 5.0,
        "output_type": "np",
    }
    wanted = pipe(**prompts, generator=generators, **settings).images
    calls = []
    images = denoise.generate_images(
        base,
        denoise.PromptEmbeds(text, negative),
        [3, 4],
        denoise.SamplingSettings(32, 32, 5, 5.0, sampler),
        on_step=lambda: calls.append(1),
    )
    assert len(calls) == denoise.count_unet_calls(base.noise_scheduler, sampler, 5) >= 5
    for image, want in zip(images, wanted, strict=True):
        assert np.abs(np.asarray(image) / 255 - want).max() < 1 / 255


@pytest.mark.slow
def test_the_samplers_differ(embedded_base):
    """The settings count, such as Karras' spacing: no two of them give the same image of a base
    that has learned something."""
    base = load_base(str(embedded_base), torch.float32)
    prompts = ["a blue robot", "blurry"]
    encoded = encode_captions(base.text_encoder, base.tokenizer, prompts)
    text, negative = (encoded[prompt][None] for prompt in prompts)
    embeds = denoise.PromptEmbeds(text, negative)
    images = set()
    for sampler in samplers.SAMPLERS:
        settings = denoise.SamplingSettings(32, 32, 4, 5.0, sampler)
        (image,) = denoise.generate_images(base, embeds, [3], settings)
        images.add(image.tobytes())
    assert len(images) == len(samplers.SAMPLERS)

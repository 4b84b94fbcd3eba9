"""Jobs, batches and variants: every image once, only what is alike in one batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megaman.files import safe_name
from megaman.sampling.jobs import (
    Job,
    base_image_file,
    distinct_names,
    image_file,
    make_batches,
    make_jobs,
    make_variants,
)
from megaman.sampling.prompts import Prompt, PromptSettings


def settings(width, height, steps, guidance_scale, negative_prompt="", seed=0):
    """The command line's settings."""
    return PromptSettings(negative_prompt, width, height, seed, guidance_scale, steps)


def test_a_prompts_own_settings_win_over_the_command_lines():
    own = Prompt("b", "", 64, 128, 0, 0.0, 3)
    jobs = make_jobs([Prompt("a"), own], settings(512, 256, 25, 7.5, "blurry", 42), 2)
    assert jobs == [
        Job(0, 0, "a", "blurry", 42, 512, 256, 25, 7.5),
        Job(0, 1, "a", "blurry", 43, 512, 256, 25, 7.5),
        Job(1, 0, "b", "", 0, 64, 128, 3, 0.0),
        Job(1, 1, "b", "", 1, 64, 128, 3, 0.0),
    ]


prompts = st.lists(
    st.builds(
        Prompt,
        text=st.sampled_from(["a", "a longer one"]),
        width=st.sampled_from([None, 64]),
        num_inference_steps=st.sampled_from([None, 3]),
        guidance_scale=st.sampled_from([None, 1.0]),
    ),
    min_size=1,
    max_size=12,
)


@given(prompts, st.integers(1, 5), st.integers(1, 7))
def test_batches_hold_every_job_once_and_in_order(prompts, count, size):
    jobs = make_jobs(prompts, settings(128, 128, 5, 2.0), count)
    batches = make_batches(jobs, lambda job: size, lambda job: len(job.prompt))
    assert [job for batch in batches for job in batch] == jobs
    for batch in batches:
        assert 1 <= len(batch) <= size
        alike = {replace(job, prompt_index=0, image_index=0, seed=0) for job in batch}
        assert len(alike) == 1


def test_variants_are_together_or_one_by_one_at_every_scale():
    loras = [(Path("out/a"), 0.8), (Path("out/b"), 1.0)]
    (together,) = make_variants(loras, [1.0], one_by_one=False)
    assert together.scales == {0: 0.8, 1: 1.0} and together.label == ()
    variants = make_variants(loras, [0.0, 0.5], one_by_one=True)
    assert [variant.scales for variant in variants] == [{0: 0.0}, {0: 0.4}, {1: 0.0}, {1: 0.5}]
    assert [variant.label for variant in variants] == [
        ("a", "0"),
        ("a", "0.5"),
        ("b", "0"),
        ("b", "0.5"),
    ]
    (none,) = make_variants([], [1.0], one_by_one=False)
    assert none.scales == {}


@given(prompts, st.integers(1, 3), st.integers(0, 2000))
def test_every_file_has_a_name_of_its_own(prompts, count, first):
    jobs = make_jobs(prompts, settings(64, 64, 5, 2.0), count)
    variants = make_variants([(Path("a"), 1.0), (Path("b"), 1.0)], [0.5, 1.0], one_by_one=True)
    names = Counter(image_file(job, variant, first) for job in jobs for variant in variants)
    names.update(base_image_file(name) for name in list(names))
    assert set(names.values()) == {1}


def test_names_of_compared_loras_are_distinct():
    paths = [Path("a/lora_weights"), Path("b/lora_weights"), Path("c/mine.safetensors")]
    assert distinct_names(paths) == ["a_lora_weights", "b_lora_weights", "c_mine"]
    assert distinct_names([Path("x/a.safetensors"), Path("x/b.safetensors")]) == ["a", "b"]
    assert distinct_names([Path("a"), Path("a")]) == ["a_1", "a_2"]
    long = f"{'a' * 60}/lora_weights"
    alike = [["a/Volto", "b/volto"], ["a?", "a*"], [f"1/{long}", f"2/{long}"], ["é", "e\u0301"]]
    for names in alike:
        found = [safe_name(name).casefold() for name in distinct_names([*map(Path, names)])]
        assert len(set(found)) == 2, "on Windows and macOS too, and where names are cut"

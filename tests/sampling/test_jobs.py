"""Jobs, batches and ways: every image once, only what is alike drawn together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megaman.sampling.jobs import Job, base_file_of, file_of, in_batches, make_jobs, make_ways
from megaman.sampling.prompts import Prompt


def test_a_prompts_own_settings_win_over_the_command_lines():
    own = Prompt("b", negative="", width=64, height=128, seed=0, guidance=0.0, steps=3)
    jobs = make_jobs([Prompt("a"), own], 2, "blurry", 42, (512, 256), 25, 7.5)
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
        steps=st.sampled_from([None, 3]),
        guidance=st.sampled_from([None, 1.0]),
    ),
    min_size=1,
    max_size=12,
)


@given(prompts, st.integers(1, 5), st.integers(1, 7))
def test_batches_hold_every_job_once_and_in_order(prompts, count, size):
    jobs = make_jobs(prompts, count, "", 0, (128, 128), 5, 2.0)
    batches = in_batches(jobs, lambda job: size, lambda job: len(job.prompt))
    assert [job for batch in batches for job in batch] == jobs
    for batch in batches:
        assert 1 <= len(batch) <= size
        alike = {(job.width, job.height, job.steps, job.guidance, len(job.prompt)) for job in batch}
        assert len(alike) == 1


def test_ways_are_together_or_one_by_one_at_every_scale():
    loras = [(Path("out/a"), 0.8), (Path("out/b"), 1.0)]
    (together,) = make_ways(loras, [1.0], one_by_one=False)
    assert together.strengths == {0: 0.8, 1: 1.0} and together.label == ()
    ways = make_ways(loras, [0.0, 0.5], one_by_one=True)
    assert [way.strengths for way in ways] == [{0: 0.0}, {0: 0.4}, {1: 0.0}, {1: 0.5}]
    assert [way.label for way in ways] == [("a", "0"), ("a", "0.5"), ("b", "0"), ("b", "0.5")]
    (none,) = make_ways([], [1.0], one_by_one=False)
    assert none.strengths == {}


@given(prompts, st.integers(1, 3), st.integers(0, 2000))
def test_every_file_has_a_name_of_its_own(prompts, count, first):
    jobs = make_jobs(prompts, count, "", 0, (64, 64), 5, 2.0)
    ways = make_ways([(Path("a"), 1.0), (Path("b"), 1.0)], [0.5, 1.0], one_by_one=True)
    names = Counter(file_of(job, way, first) for job in jobs for way in ways)
    names.update(base_file_of(name) for name in list(names))
    assert set(names.values()) == {1}

"""The record of a run comes back whole, is cut to the checkpoint's step, and never stops a run."""

from __future__ import annotations

import json

import pytest

from megaman.training.history import (
    HISTORY,
    NearestImage,
    RunHistory,
    Sample,
    Warned,
    restore,
)


def recorded() -> RunHistory:
    """Four steps with evaluations, samples and a warning at steps 0, 2 and 4."""
    history = RunHistory()
    losses = [0.1 + 0.2, 1 / 3, float("nan"), 5e-324]
    history.add_steps(losses, [1.0, 2.0, float("inf"), 3.0], [[1e-4, 5e-5]] * 4)
    for step in (0, 2, 4):
        history.add_evaluation(step, "held_out", 1 / (step + 3), [0.1, float("nan")])
        sample = Sample(f"samples-{step}/00.png", "a robot, 洛克人", 7, settings={"guidance": 7.5})
        history.add_samples(step, [sample])
        history.add_similarity(step, [NearestImage(sample.file, "images/x.png", 0.25, step == 4)])
        history.add_drift(step, step / 7)
        history.add_warning(step, f"after step {step}")
    return history


def test_a_history_comes_back_bit_for_bit(tmp_path):
    history = recorded()
    history.save(tmp_path / HISTORY)
    restored = restore(tmp_path, 4)
    assert restored.as_json() == history.as_json()
    assert restored.losses == [0.1 + 0.2, 1 / 3, None, 5e-324]
    restored.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / HISTORY).read_bytes()


def test_a_history_is_cut_to_the_checkpoint_and_continues(tmp_path):
    recorded().save(tmp_path / HISTORY)
    restored = restore(tmp_path, 2)
    assert restored.last_step == 2
    assert [item.step for item in restored.evaluations_of("held_out")] == [0, 2]
    assert list(restored.samples) == list(restored.nearest) == list(restored.drift) == [0, 2]
    assert restored.warnings == [Warned(0, "after step 0"), Warned(2, "after step 2")]


def test_what_is_repeated_replaces_the_first(tmp_path):
    history = recorded()
    history.add_evaluation(4, "held_out", 9.0)
    history.add_warning(4, "after step 0")
    assert history.evaluations_of("held_out")[-1].loss == 9.0
    assert len(history.evaluations) == len(history.warnings) == 3


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "{}", '{"loss": 1}', json.dumps({**recorded().as_json(), "loss": [1.0]})],
)
def test_without_a_valid_history_the_curves_begin_at_the_step(content, tmp_path):
    if content is not None:
        (tmp_path / HISTORY).write_text(content)
    restored = restore(tmp_path, 4)
    assert restored.first_step == 5
    assert not restored.losses and not restored.samples

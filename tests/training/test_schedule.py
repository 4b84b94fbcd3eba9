"""Which image, which random numbers and which learning rate come when; no call changes the next
one."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given
from hypothesis import strategies as st

from megaman.config.contradictions import POLYNOMIAL_END
from megaman.config.learning_settings import SCHEDULERS
from megaman.data.batches import epoch_order, generator_for, position_at, seed_dropout
from megaman.training.optimizer import learning_rate, total_steps

SEED = st.integers(0, 2**63 - 1)


@given(st.integers(1, 60), SEED, st.integers(0, 1000))
def test_every_image_comes_once_an_epoch(count, seed, epoch):
    seen = [position_at(epoch * count + place, count, seed) for place in range(count)]
    assert sorted(seen) == list(range(count))


@given(st.integers(1, 30), st.integers(1, 12), SEED)
def test_whatever_the_batch_every_image_comes_equally_often(count, batch, seed):
    """A batch reaches into the next epoch, so that no image is missed and no batch is smaller."""
    steps = 3 * count  # three epochs for each image in a batch
    seen = [
        position_at(step * batch + place, count, seed)
        for step in range(steps)
        for place in range(batch)
    ]
    assert {seen.count(image) for image in range(count)} == {3 * batch}


def test_epochs_and_seeds_have_their_own_order():
    orders = {epoch_order(20, seed, epoch) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100
    assert epoch_order(20, 3, 4) == epoch_order(20, 3, 4)


def test_a_resumed_run_gets_the_same_images_whatever_was_asked_before():
    undisturbed = [position_at(sample_index, 7, 5) for sample_index in range(100)]
    backwards = [position_at(sample_index, 7, 5) for sample_index in reversed(range(100))]
    assert backwards[::-1] == undisturbed
    assert [position_at(sample_index, 7, 5) for sample_index in range(50, 100)] == undisturbed[50:]


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "steps"),
    [
        (20, 1, 100, 2000),
        (20, 4, 100, 500),
        (10, 4, 1, 3),
        (10, 4, 2, 5),
        (1, 1, 1, 1),
        (3, 64, 1, 1),
        (7, 2, 3, 11),
    ],
)
def test_steps_of_the_epochs(count, batch, epochs, steps):
    assert total_steps(count, batch, epochs, None) == steps
    assert total_steps(count, batch, epochs, 1234) == 1234, "the steps win where both are given"


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 50))
def test_the_steps_are_just_enough_for_the_epochs(count, batch, epochs):
    steps = total_steps(count, batch, epochs, None)
    assert (steps - 1) * batch < epochs * count <= steps * batch


def random_numbers(seed: int, sample_index: int) -> bytes:
    return torch.randn(8, generator=generator_for(seed, sample_index)).numpy().tobytes()


@given(SEED, st.integers(0, 10**9))
def test_random_numbers_depend_on_seed_and_sample_index_alone(seed, sample_index):
    torch.manual_seed(0)
    first = random_numbers(seed, sample_index)
    torch.manual_seed(1)
    assert random_numbers(seed, sample_index) == first, "not on the global generator"
    assert (
        len({first, random_numbers(seed, sample_index + 1), random_numbers(seed ^ 1, sample_index)})
        == 3
    )


def test_seed_and_sample_index_are_kept_apart():
    all_numbers = [
        random_numbers(seed, sample_index) for seed in range(30) for sample_index in range(30)
    ]
    assert len(set(all_numbers)) == len(all_numbers)
    assert random_numbers(1, 11) != random_numbers(11, 1) and random_numbers(
        1, 12
    ) != random_numbers(11, 2)


PEAK, WARMUP, TOTAL = 1e-3, 20, 120
# The learning rate at the start of the warm-up, half-way up, at its end, half-way down and at the
# end, as shares of the peak.
SHARES = {
    "linear": [0, 0.5, 1, 0.5, 0],
    "cosine": [0, 0.5, 1, 0.5, 0],
    "cosine_with_restarts": [0, 0.5, 1, 0.5, 0],
    "polynomial": [0, 0.5, 1, 0.5 + POLYNOMIAL_END / PEAK / 2, POLYNOMIAL_END / PEAK],
    "constant": [1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 0.5, 1, 1, 1],
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_start_peak_and_end_of_every_schedule(name):
    lr = learning_rate(name, PEAK, WARMUP, TOTAL)
    steps = [0, WARMUP // 2, WARMUP, (WARMUP + TOTAL) // 2, TOTAL]
    assert [lr(step) for step in steps] == pytest.approx(
        [share * PEAK for share in SHARES[name]], abs=1e-12
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_is_diffusers_own_schedule_step_by_step(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL)
    lr = learning_rate(name, PEAK, WARMUP, TOTAL)
    for step in range(TOTAL):
        assert lr(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        schedule.step()


@given(st.sampled_from(SCHEDULERS), st.floats(1.1e-7, 1), st.integers(0, 50), st.integers(1, 100))
def test_no_learning_rate_leaves_its_bounds(name, peak, warmup, total):
    lr = learning_rate(name, peak, warmup, total)
    lrs = [lr(step) for step in range(total)]
    assert all(0 <= value <= peak * (1 + 1e-9) for value in lrs)
    rising = lrs[: warmup + 1]
    assert rising == sorted(rising) or name == "constant"
    falling = lrs[warmup:]
    assert falling == sorted(falling, reverse=True)
    assert lrs == [lr(step) for step in range(total)]


def test_dropout_depends_on_seed_and_micro_batch():
    """The same for the same sample index, whatever was generated in between; another for another;
    independent of the noise."""

    def random_numbers(seed: int, sample_index: int) -> torch.Tensor:
        seed_dropout(seed, sample_index)
        return torch.rand(8)

    once = random_numbers(0, 5)
    assert not torch.equal(random_numbers(0, 6), once)
    assert not torch.equal(random_numbers(1, 5), once)
    assert torch.equal(random_numbers(0, 5), once)
    assert not torch.equal(torch.rand(8, generator=generator_for(0, 5)), once)

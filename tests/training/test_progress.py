"""What is due after a step, and what each process of a run logs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megaman.training.history import RunHistory
from megaman.training.progress import LOG_STEPS, Progress
from megaman.training.tensorboard import TrainingLog


class FakeRun:
    """A run of 100 steps in one of world_size processes; questions counts how often they agreed on
    a stop."""

    device, scaler = torch.device("cpu"), None
    compute = SimpleNamespace(mixed_precision="no")

    def __init__(self, world_size: int = 1, rank: int = 0):
        self.world_size, self.is_main_process = world_size, rank == 0
        self.state = SimpleNamespace(step=1, elapsed=0.0)
        self.elapsed = 0.0
        self.report = SimpleNamespace(update=lambda step: None, end=lambda reason: None)
        self.stop_signal = SimpleNamespace(received=None, exit_code=143)
        self.output = SimpleNamespace(checkpoint_folder=lambda step: f"checkpoint-{step}")
        self.writers: list[SimpleNamespace] = []
        self.log = TrainingLog(self._open_writer, None)
        self.history = RunHistory()
        self.questions = 0

    def _open_writer(self, purge_step: int | None) -> SimpleNamespace:
        def ignore(*args: Any, **kwargs: Any) -> None: ...

        writer = SimpleNamespace(add_scalar=ignore, flush=ignore, close=ignore)
        self.writers.append(writer)
        return writer

    def any_process(self, condition: bool) -> bool:
        self.questions += 1
        return condition

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def progress_bar(self, **options: Any) -> SimpleNamespace:
        def ignore(*args: Any, **kwargs: Any) -> None: ...

        return SimpleNamespace(update=ignore, close=ignore, set_postfix=ignore, disable=True)


def progress_of(run: FakeRun) -> Progress:
    schedule = SimpleNamespace(total_steps=100, images_per_step=1)
    optimizer = SimpleNamespace(learning_rates=[float])
    return Progress(cast(Any, run), cast(Any, schedule), cast(Any, optimizer), 25, 50)


def test_one_process_stops_after_the_step():
    run = FakeRun()
    run.stop_signal.received = 15
    due = progress_of(run).due(3)
    assert due.stop and due.save and due.log


def test_several_processes_agree_at_the_pace_of_the_log():
    run = FakeRun(world_size=2)
    progress = progress_of(run)
    run.stop_signal.received = 15
    stops = [step for step in range(2, 30) if progress.due(step).stop]
    assert stops == [10, 20, 25], "with the log, and with a checkpoint"
    assert run.questions == 3 and LOG_STEPS == 10


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_process_writes_events_when_stopped(rank):
    run = FakeRun(world_size=2, rank=rank)
    progress = progress_of(run)
    for step in (2, 3):
        progress.record(step, torch.tensor(0.5), torch.tensor(1.0), torch.tensor(True))
    progress.flush(3)
    progress.stop(3, True, "command")
    assert len(run.writers) == (1 if rank == 0 else 0)

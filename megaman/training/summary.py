"""The last lines of a run: what was gained, and where everything is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaman.config.train import TrainConfig
    from megaman.training.history import RunHistory
    from megaman.training.run import Run


def closing_lines(config: TrainConfig, run: Run) -> Iterator[str]:
    """What was gained, and where page, samples and TensorBoard are."""
    yield from gain_lines(run.history)
    yield f"page       {run.report.page.resolve().as_uri()}"
    if run.history.samples:
        folder = run.output.samples_folder(max(run.history.samples))
        yield f"samples    {folder}"
    yield f"curves     tensorboard --logdir {config.output.logging_dir}"


def gain_lines(history: RunHistory) -> Iterator[str]:
    """The held-out loss from the first evaluation to the best one, if there are two."""
    evaluations = [
        (item.loss, item.step)
        for item in history.evaluations_of("held_out")
        if item.loss is not None
    ]
    if len(evaluations) < 2:
        return
    first, start = evaluations[0]
    best, step = min(evaluations)
    change = f" ({100 * (best / first - 1):+.0f} %)" if first else ""
    yield f"gained     held-out loss {first:.4f} at step {start}, {best:.4f} at step {step}{change}"

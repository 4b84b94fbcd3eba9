"""What a run shows of its steps: a bar in a terminal, lines elsewhere, events for programs."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from megaman.console import log_event

if TYPE_CHECKING:
    from megaman.training.history import RunHistory
    from megaman.training.report import StepReport

LINE_SECONDS = 30.0  # between two lines where there is no bar
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
GB = 2**30

log = logging.getLogger(__name__)


class ProgressBar(Protocol):
    """What is used of tqdm's bar."""

    disable: bool

    def update(self) -> object: ...
    def set_postfix_str(self, s: str) -> None: ...
    def close(self) -> None: ...


class Status:
    """Shows where a run is; bar is disabled where nobody would see it move."""

    def __init__(self, bar: ProgressBar, history: RunHistory):
        self._bar, self._history = bar, history
        self._has_shown_pace = False
        self._last_line = time.monotonic()

    def advance(self) -> None:
        """Count a step."""
        self._bar.update()

    def show(self, where: StepReport) -> None:
        """Show the numbers of a step: loss, speed, memory, and the time that is left."""
        numbers = self._numbers(where)
        if not self._bar.disable:
            self._bar.set_postfix_str(numbers)
        if not self._has_shown_pace:
            self._has_shown_pace = True
            self._show_pace(where)
        is_last = where.step == where.total_steps
        is_due = time.monotonic() >= self._last_line + LINE_SECONDS or is_last
        message = ""
        if self._bar.disable and is_due:
            message = f"step {where.step}/{where.total_steps}: {numbers}"
            self._last_line = time.monotonic()
        self._log_step(message, where)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _log_step(self, message: str, where: StepReport) -> None:
        history = self._history
        held_out = history.evaluations_of("held_out")
        log_event(
            log,
            "step",
            message,
            **asdict(where),
            loss=history.losses[-1],
            smoothed_loss=history.smoothed.values[-1],
            held_out_loss=held_out[-1].loss if held_out else None,
            gradient_norm=history.gradient_norms[-1],
            learning_rates=history.learning_rates[-1],
        )

    def _numbers(self, where: StepReport) -> str:
        history = self._history
        loss, held_out = history.smoothed.values[-1], history.evaluations_of("held_out")
        parts = [f"loss={loss:.4f}" if loss is not None else "loss=nan"]
        if held_out and held_out[-1].loss is not None:
            parts.append(f"held-out={held_out[-1].loss:.4f}")
        parts.append(f"lr={history.learning_rates[-1][0]:.2e}")
        if where.images_per_second:
            parts.append(f"{where.images_per_second:.3g} images/s")
        if where.memory:
            parts.append(f"{where.memory / GB:.1f} GB")
        if where.seconds_left is not None and where.step < where.total_steps:
            parts.append(f"{duration(where.seconds_left)} left")
        return ", ".join(parts)

    def _show_pace(self, where: StepReport) -> None:
        """How long the run will take, once its first steps have been measured."""
        if where.seconds_left is None or where.seconds_per_step is None:
            return
        if where.step == where.total_steps:
            return
        end = time.strftime("%H:%M", time.localtime(time.time() + where.seconds_left))
        log.info(
            "speed      %.3g s a step, %.3g images/s: about %s left, until %s",
            where.seconds_per_step,
            where.images_per_second or 0.0,
            duration(where.seconds_left),
            end,
        )


def duration(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

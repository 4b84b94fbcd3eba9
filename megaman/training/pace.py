"""How fast a run is and how long it will take, by a clock that is read where the run waits for its
device anyway. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """The seconds of the steps, and those of what comes between: sample images, checkpoints.

    Args:
        last: the last step.
        events: how many of these are still to come after a step.
        first_pause: seconds of what came before the first step.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        last: int,
        events: Callable[[int], int],
        first_pause: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._last, self._events, self._clock = last, events, clock
        self._num_pauses = 1
        self._pause_seconds = first_pause
        self._num_steps = 0
        self._step_seconds = self._recent = 0.0
        self._resumed_at = clock()
        self._paused_at: float | None = None

    def resume(self) -> None:
        """Note that a step begins; what came since pause() was no step."""
        if self._paused_at is not None:
            self._pause_seconds += self._clock() - self._paused_at
            self._resumed_at, self._paused_at = self._clock(), None

    def pause(self, num_steps: int, num_events: int) -> None:
        """Note that so many steps have ended since the last call, and how many events follow."""
        now = self._clock()
        seconds = now - self._resumed_at
        self._num_steps += num_steps
        self._step_seconds += seconds
        self._recent = seconds / max(1, num_steps)
        self._num_pauses += num_events
        self._paused_at = now

    @property
    def has_measured(self) -> bool:
        """Whether any step has ended."""
        return self._num_steps > 0

    @property
    def seconds_per_step(self) -> float:
        """The mean over this session's steps, without the pauses; 0 before the first."""
        return self._step_seconds / self._num_steps if self._num_steps else 0.0

    @property
    def recent_seconds_per_step(self) -> float:
        """The mean over the steps before the last pause()."""
        return self._recent

    def seconds_left(self, step: int) -> float:
        """How long the rest will take after this step, pauses included."""
        pause = self._pause_seconds / self._num_pauses
        return (self._last - step) * self.seconds_per_step + self._events(step) * pause

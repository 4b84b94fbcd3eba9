"""Stopping a run on purpose: Ctrl-C, a kill or a closing console end after the step in hand; a
second one at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StoppedError(Exception):
    """Raised inside a long piece of work, such as drawing pictures, that a stop should not wait
    for."""


class StopSignal:
    """While entered, the first signal is only noted and the second raises KeyboardInterrupt.

    SIGBREAK is what Windows sends as a console closes, SIGHUP what the others do.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows handlers nowhere else
            for name in self.NAMES:
                if number := getattr(signal, name, None):
                    self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after the others, as shells have it."""
        return 130 if self.received == signal.SIGINT else 143

    def raise_if_received(self) -> None:
        """Leave a long piece of work; raises StoppedError once a signal has come."""
        if self.received is not None:
            raise StoppedError

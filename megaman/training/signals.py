"""Stopping a run on purpose: Ctrl-C, a kill or a closed console ends it after the current step; a
second signal ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StoppedError(Exception):
    """Raised inside long work that a stop should not wait for, such as sampling images."""


class StopSignal:
    """While entered, the first signal is only noted and the second raises KeyboardInterrupt.

    Windows sends SIGBREAK when a console closes, the others SIGHUP.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for name in self.NAMES:
                number = getattr(signal, name, None)
                if number is not None:
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
        """130 after Ctrl-C, 143 after the others, as shells report it."""
        return 130 if self.received == signal.SIGINT else 143

    def raise_if_received(self) -> None:
        """Raise StoppedError once a signal has come."""
        if self.received is not None:
            raise StoppedError

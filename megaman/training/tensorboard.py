"""TensorBoard, in such a way that a full disk or a folder that cannot be written never takes the
training with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from megaman.errors import summarize_error

MOST_PENDING = 20_000  # events kept while nothing can be written: a long stretch, a few megabytes


class Event(NamedTuple):
    kind: str  # the SummaryWriter's method: add_scalar, add_image, add_text
    tag: str
    value: Any
    step: int
    options: dict[str, Any]


class TrainingLog:
    """Events are kept until flush() has written them; what could not be written is tried again at
    the next flush.

    open_writer makes a SummaryWriter for a purge_step. purge_step is the first step that a resumed
    run writes again: TensorBoard then forgets what stood there before. tell is called with one line
    when writing begins to fail, and when it works again.
    """

    def __init__(
        self,
        open_writer: Callable[[int | None], Any],
        purge_step: int | None,
        tell: Callable[[str], None],
    ):
        self._open_writer, self._tell = open_writer, tell
        self._purge_step = purge_step
        self._pending: list[Event] = []
        self._writer = None
        self._failing = False
        _silence_writer_threads()

    def add(self, kind: str, tag: str, value: Any, step: int, **options: Any) -> None:
        """Keep an event for the next flush."""
        self._pending.append(Event(kind, tag, value, step, options))
        del self._pending[:-MOST_PENDING]

    def add_steps(
        self, last: int, losses: Sequence[float], rates: Sequence[Callable[[int], float]]
    ) -> None:
        """Keep the losses of the steps up to last, and their rates: the UNet's, and the text
        encoder's where it is trained, as functions of the steps done before."""
        for step, loss in enumerate(losses, start=last - len(losses) + 1):
            self.add("add_scalar", "train/loss", loss, step)
            for tag, rate in zip(
                ["learning_rate", "text_encoder_learning_rate"], rates, strict=False
            ):
                self.add("add_scalar", f"train/{tag}", rate(step - 1), step)

    def add_images(self, tag: str, pixels: Iterable[Any], step: int) -> None:
        """Write images, as arrays [H, W, 3], under tag/00, tag/01 and so on."""
        for j, image in enumerate(pixels):
            self.add("add_image", f"{tag}/{j:02d}", image, step, dataformats="HWC")
        self.flush()

    def flush(self) -> None:
        """Write what is kept to the disk, or say why that cannot be done now."""
        if not self._pending:
            return
        try:
            if self._writer is None:
                self._writer = self._open_writer(self._purge_step)
            for event in self._pending:
                getattr(self._writer, event.kind)(
                    event.tag, event.value, event.step, **event.options
                )
            self._writer.flush()
        except (OSError, RuntimeError) as error:
            self._fail(error)
            return
        if self._failing:
            self._tell("TensorBoard's curves are written again")
        self._failing, self._pending = False, []

    def _fail(self, error: Exception) -> None:
        if not self._failing:
            self._tell(
                f"TensorBoard's curves cannot be written ({summarize_error(error)}); training goes on"
            )
        self._failing, self._writer = True, None
        # Part of the events may stand in the broken file; the next file takes their place.
        scalars = [event.step for event in self._pending if event.kind == "add_scalar"]
        if scalars:
            self._purge_step = min(scalars)

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()


def _silence_writer_threads() -> None:
    """TensorBoard's own thread dies in silence: its error reaches flush() all the same."""
    usual = threading.excepthook

    def silent_for_writers(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            usual(failure)

    if getattr(usual, "__name__", "") != silent_for_writers.__name__:
        threading.excepthook = silent_for_writers

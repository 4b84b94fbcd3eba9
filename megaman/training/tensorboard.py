"""TensorBoard, written so that a full disk or a read-only folder never stops the training."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megaman.errors import summarize_error

if TYPE_CHECKING:
    from megaman.training.history import Evaluation

MAX_PENDING = 20_000  # events kept while nothing can be written: many steps, a few megabytes
LR_TAGS = ("learning_rate", "text_encoder_learning_rate")
EVALUATION_TAGS = {
    "held_out": "held_out/loss",
    "train": "held_out/train_loss",
    "ema": "held_out/ema_loss",
}

log = logging.getLogger(__name__)


class Event(NamedTuple):
    """A call of one of SummaryWriter's methods: add_scalar, add_image, add_text, add_hparams."""

    kind: str
    tag: str
    value: Any
    step: int
    options: dict[str, Any]


class TrainingLog:
    """Keeps events until flush() has written them; what could not be written is tried again at the
    next flush.

    Args:
        open_writer: makes a SummaryWriter for a purge_step.
        purge_step: the first step that a resumed run writes again: TensorBoard then drops what an
            earlier run wrote from there on. None for a new run.
    """

    def __init__(self, open_writer: Callable[[int | None], Any], purge_step: int | None):
        self._open_writer, self._purge_step = open_writer, purge_step
        self._pending: list[Event] = []
        # A resumed run may repeat what was evaluated at the step that it resumes from.
        self._first = max(0, (purge_step or 0) - 1)
        self._evaluated: set[tuple[int, str]] = set()
        self._writer = None
        self._is_failing = False
        self.is_written = False  # whether anything has reached the folder
        _silence_writer_threads()

    def add(self, kind: str, tag: str, value: Any, step: int, **options: Any) -> None:
        """Keep an event for the next flush."""
        self._pending.append(Event(kind, tag, value, step, options))
        del self._pending[:-MAX_PENDING]

    def add_steps(
        self,
        last: int,
        losses: Sequence[float],
        learning_rates: Sequence[Callable[[int], float]],
    ) -> None:
        """Keep the losses of the steps up to last, and their learning rates: the UNet's and, if it
        is trained, the text encoder's, as functions of the steps done before."""
        for step, loss in enumerate(losses, start=last - len(losses) + 1):
            self.add("add_scalar", "train/loss", loss, step)
            for tag, lr in zip(LR_TAGS, learning_rates, strict=False):
                self.add("add_scalar", f"train/{tag}", lr(step - 1), step)

    def add_curve(self, tag: str, values: Sequence[float | None], last: int) -> None:
        """Keep a value for each of the steps up to last; None for one that was not finite."""
        for step, value in enumerate(values, start=last - len(values) + 1):
            if value is not None:
                self.add("add_scalar", tag, value, step)

    def add_evaluations(self, evaluations: Iterable[Evaluation]) -> None:
        """Keep those that have not been kept or written before."""
        for item in evaluations:
            key = item.step, item.name
            if item.loss is not None and key not in self._evaluated and item.step >= self._first:
                self.add("add_scalar", EVALUATION_TAGS[item.name], item.loss, item.step)
            self._evaluated.add(key)

    def add_images(
        self, tag: str, pixels: Iterable[Any], step: int, names: Sequence[str] = ()
    ) -> None:
        """Write images, as arrays [H, W, 3], under tag/00, tag/01 and so on; TensorBoard shows
        their names, which are their prompts, in place of these tags."""
        for i, image in enumerate(pixels):
            name = names[i] if i < len(names) else ""
            self.add("add_image", f"{tag}/{i:02d}", image, step, name=name)
        self.flush()

    def add_result(
        self, settings: Mapping[str, Any], metrics: Mapping[str, float | None], step: int
    ) -> None:
        """Keep the settings of a run and what came of it, for TensorBoard's table of runs."""
        values = {name: _hparam(value) for name, value in settings.items() if value is not None}
        finite = {name: value for name, value in metrics.items() if value is not None}
        self.add("add_hparams", "", (values, finite), step)

    def flush(self) -> None:
        """Write all pending events to the disk, or log why that is not possible now."""
        if not self._pending:
            return
        try:
            if self._writer is None:
                self._writer = self._open_writer(self._purge_step)
            for event in self._pending:
                _write(self._writer, event)
            self._writer.flush()
        except (OSError, RuntimeError) as error:
            self._fail(error)
            return
        if self._is_failing:
            log.info("TensorBoard's curves are written again")
        self._is_failing, self._pending, self.is_written = False, [], True

    def _fail(self, error: Exception) -> None:
        if not self._is_failing:
            reason = summarize_error(error)
            log.info("TensorBoard's curves cannot be written (%s); training continues", reason)
        self._is_failing, self._writer = True, None
        # The broken file may hold some of the events; the next file replaces them.
        scalars = [event.step for event in self._pending if event.kind == "add_scalar"]
        if scalars:
            self._purge_step = min(scalars)

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):  # a run is never lost for its curves
                self._writer.close()


def open_training_log(folder: Path, purge_step: int | None) -> TrainingLog:
    """A TrainingLog that writes into this folder once there is something to write."""
    from torch.utils.tensorboard import SummaryWriter

    return TrainingLog(lambda step: SummaryWriter(str(folder), "", step), purge_step)


def _write(writer: Any, event: Event) -> None:
    if event.kind == "add_hparams":
        settings, metrics = event.value
        writer.add_hparams(settings, metrics, run_name=".", global_step=event.step)
    elif event.kind == "add_image":
        _write_image(writer, event)
    else:
        getattr(writer, event.kind)(event.tag, event.value, event.step, **event.options)


def _write_image(writer: Any, event: Event) -> None:
    """As SummaryWriter.add_image does, and with a name to be shown."""
    from torch.utils.tensorboard.summary import image

    summary = image(event.tag, event.value, dataformats="HWC")
    metadata = summary.value[0].metadata
    metadata.display_name = event.options["name"]
    metadata.plugin_data.plugin_name = "images"  # which TensorBoard else misses
    writer._get_file_writer().add_summary(summary, event.step)


def _hparam(value: Any) -> bool | int | float | str:
    """A setting as TensorBoard's table takes it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return value if isinstance(value, (bool, int, float)) else str(value)


def _silence_writer_threads() -> None:
    """Keep TensorBoard's own thread from printing a traceback: its error reaches flush() all the
    same."""
    usual = threading.excepthook

    def silent_for_writers(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            usual(failure)

    if getattr(usual, "__name__", "") != silent_for_writers.__name__:
        threading.excepthook = silent_for_writers

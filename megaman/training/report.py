"""The live page of a run, training_report.html: written so that it costs the loop next to nothing,
and that a full disk or a read-only folder never stops the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaman.errors import summarize_error
from megaman.files import path_within
from megaman.pages import training_page
from megaman.training import series
from megaman.training.history import EVALUATIONS, NearestImage, RunHistory, Sample
from megaman.training.thumbnails import Thumbnails

MIN_INTERVAL = 2.0  # seconds between two writes
COST_SHARE = 100  # a write that took a second is followed by as many without one
STALE_AFTER = 120.0  # seconds without a write after which a page says so, at least

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """Where the loop stands: seconds of training so far and to come, speed, memory in bytes, and
    the step of the last checkpoint, 0 if there is none."""

    step: int
    total_steps: int
    elapsed: float
    seconds_left: float | None = None
    seconds_per_step: float | None = None
    images_per_second: float | None = None
    memory: int | None = None
    checkpoint: int = 0


class TrainingReport:
    """The page next to the run's outputs; only the main process has an active one.

    It shows the history it was made with. Nothing is written before begin(), except that a run
    that resumes notes its end on the page it left. Nothing is raised: what cannot be written is
    logged once and tried again.
    """

    def __init__(self, folder: Path, history: RunHistory, is_active: bool, resumes: bool = False):
        self._resumes = resumes
        self._folder, self._history, self._is_active = folder, history, is_active
        self._thumbnails = Thumbnails(folder)
        self._content: dict[str, Any] = {}
        self._where = StepReport(0, 0, 0.0)
        self._has_begun = self._is_failing = False
        self._next_write = self._last_write = self._longest_gap = 0.0

    @property
    def page(self) -> Path:
        """The page's path."""
        return self._folder / training_page.PAGE

    def begin(self, make_about: Callable[[Thumbnails], dict[str, Any]], where: StepReport) -> None:
        """Write the page and what stays the same on it, in the main process."""
        if not self._is_active:
            return
        self._has_begun, self._where = True, where
        self._content = {"started": time.time()}

        def write() -> None:
            training_page.write_page(self._folder)
            about = make_about(self._thumbnails)
            training_page.write_data(self._folder, training_page.ABOUT, about)

        self._attempt(write)
        self._write_live("running")

    def update(self, where: StepReport) -> None:
        """Show where the loop stands, unless the last write was just now."""
        self._where = where
        if time.monotonic() >= self._next_write:
            self._write_live("running")

    def end(self, state: str, **more: str) -> None:
        """Show that the run is "finished", "stopped" or "failed", and more: a reason, or commands.

        The first end counts; of a finished run, the last.
        """
        if self._content.get("ended") != "failed":
            self._content |= {"ended": state, **more}
            if self._has_begun:
                self._write_live(state)
            elif self._is_active and self._resumes:
                self._attempt(lambda: self._amend(state))

    def _amend(self, state: str) -> None:
        """Show an end on the page that the run left before it was resumed."""
        content = training_page.read_data(self._folder, training_page.LIVE)
        if content is not None:
            content |= {**self._content, "state": state, "updated": time.time()}
            training_page.write_data(self._folder, training_page.LIVE, content)

    def _write_live(self, state: str) -> None:
        if not (self._is_active and self._has_begun):
            return
        started = time.monotonic()
        if self._last_write:
            self._longest_gap = max(self._longest_gap, started - self._last_write)
        content = {
            **self._content,
            **asdict(self._where),
            "state": state,
            "updated": time.time(),
            "stale_after": max(STALE_AFTER, 4 * self._longest_gap),
            **live_content(self._history, self._folder, self._thumbnails),
        }
        self._attempt(lambda: training_page.write_data(self._folder, training_page.LIVE, content))
        self._last_write = time.monotonic()
        pause = max(MIN_INTERVAL, COST_SHARE * (self._last_write - started))
        self._next_write = self._last_write + pause

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # whatever it is: a page is no reason to lose a run
            if not self._is_failing:
                reason = summarize_error(error)
                log.info(
                    "the page %s cannot be written (%s); training continues", self.page, reason
                )
            self._is_failing = True
        else:
            self._is_failing = False


def live_content(history: RunHistory, folder: Path, thumbnails: Thumbnails) -> dict[str, Any]:
    """What the page shows of a history; files that are not below folder are skipped."""
    prompts: dict[str, int] = {}
    return {
        "curves": _curves(history),
        "evaluations": {
            name: [
                [item.step, item.loss, list(item.by_bin)] for item in history.evaluations_of(name)
            ]
            for name in EVALUATIONS
        },
        "drift": sorted([step, value] for step, value in history.drift.items()),
        "samples": [
            {"step": step, "images": images}
            for step in sorted(history.samples)
            if (images := list(_images(history, step, folder, thumbnails, prompts)))
        ],
        "prompts": list(prompts),
        "warnings": [[warning.step, warning.text] for warning in history.warnings],
    }


def _curves(history: RunHistory) -> dict[str, Any]:
    ends = series.bucket_ends(len(history.losses))
    num_rates = max(map(len, history.learning_rates), default=0)
    return {
        "steps": [history.first_step + end - 1 for end in ends],
        "loss": series.thin(history.losses, ends)._asdict(),
        "smoothed": series.last_of_each(history.smoothed.values, ends),
        "gradient_norm": series.thin(history.gradient_norms, ends)._asdict(),
        "learning_rates": [
            series.last_of_each([rates[i] for rates in history.learning_rates], ends)
            for i in range(num_rates)
        ],
    }


def _images(
    history: RunHistory,
    step: int,
    folder: Path,
    thumbnails: Thumbnails,
    prompts: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """The sample images of a step that exist; prompts numbers their prompts."""
    nearest = {item.sample: item for item in history.nearest.get(step, [])}
    for sample in history.samples[step]:
        if _is_below(folder, sample.file):
            image = _image(sample, prompts)
            if sample.file in nearest:
                image["nearest"] = _nearest(nearest[sample.file], thumbnails)
            yield image


def _image(sample: Sample, prompts: dict[str, int]) -> dict[str, Any]:
    return {
        "file": sample.file,
        "prompt": prompts.setdefault(sample.prompt, len(prompts)),
        "seed": sample.seed,
        "negative": sample.negative_prompt,
        "settings": sample.settings,
    }


def _nearest(nearest: NearestImage, thumbnails: Thumbnails) -> dict[str, Any]:
    return {
        "file": thumbnails.of(Path(nearest.image)),
        "name": Path(nearest.image).name,
        "distance": nearest.distance,
        "warns": nearest.is_warning,
    }


def _is_below(folder: Path, file: str) -> bool:
    """Whether it is a file below folder: a checkpoint from elsewhere may name any."""
    return (folder / file).is_file() and path_within(str(folder / file), str(folder)) is not None

"""The record of a run by step: losses, gradient norms, learning rates, evaluations, sample images
and warnings. A checkpoint holds it, so that a resumed run continues the same curves.

Needs no torch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.errors import UserError, summarize_error
from megaman.files import read_json, write_text
from megaman.training.series import Smoothed

HISTORY = "run_history.json"  # in a checkpoint
EVALUATIONS = ("held_out", "train", "ema")  # which loss an evaluation is

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A loss after a step, over all timesteps and by timestep bin, low timesteps first.

    name is "held_out", "train" (as many training images at the same noise) or "ema" (held-out
    images, the averaged adapter).
    """

    step: int
    name: str
    loss: float | None
    by_bin: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A sample image of a step; file is relative to the output folder, with forward slashes.

    settings are shown under these names, such as {"guidance": 7.5}.
    """

    file: str
    prompt: str
    seed: int
    negative_prompt: str = ""
    settings: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class NearestImage:
    """The training image that is nearest to a sample image: sample is the Sample's file, image the
    path of the training image; is_warning means that the distance is suspiciously small."""

    sample: str
    image: str
    distance: float
    is_warning: bool = False


@dataclass(frozen=True)
class Warned:
    """A line that the user should read, and the step after which it was logged."""

    step: int
    text: str


class RunHistory:
    """What a run has recorded so far. Every process has one; only the main process's is saved.

    Adding an evaluation, samples, a similarity or a drift a second time for the same step replaces
    the first, so that a run that resumes before it may repeat it. Numbers that are not finite are
    kept as None.
    """

    def __init__(self, first_step: int = 1):
        self.first_step = first_step  # earlier steps were done before there was a history
        self.losses: list[float | None] = []
        self.smoothed = Smoothed()  # of the losses
        self.gradient_norms: list[float | None] = []
        self.learning_rates: list[list[float]] = []  # by step: the UNet's, the text encoder's
        self.evaluations: list[Evaluation] = []
        self.samples: dict[int, list[Sample]] = {}
        self.nearest: dict[int, list[NearestImage]] = {}
        self.drift: dict[int, float | None] = {}
        self.warnings: list[Warned] = []

    @property
    def last_step(self) -> int:
        """The last step with a loss, or the step before the first."""
        return self.first_step - 1 + len(self.losses)

    def add_steps(
        self,
        losses: Sequence[float],
        gradient_norms: Sequence[float],
        learning_rates: Sequence[Sequence[float]],
    ) -> None:
        """Add the steps after the last one: means over the processes, norms before clipping, and
        the learning rates of each step."""
        self.losses += map(_finite, losses)
        for loss in losses:
            self.smoothed.add(_finite(loss))
        self.gradient_norms += map(_finite, gradient_norms)
        self.learning_rates += map(list, learning_rates)

    def add_evaluation(
        self, step: int, name: str, loss: float, by_bin: Sequence[float] = ()
    ) -> None:
        """Add a loss of EVALUATIONS after a step (0: before the first)."""
        if name not in EVALUATIONS:
            raise ValueError(f"{name} is none of {EVALUATIONS}")
        others = [item for item in self.evaluations if (item.step, item.name) != (step, name)]
        new = Evaluation(step, name, _finite(loss), tuple(map(_finite, by_bin)))
        self.evaluations = [*others, new]

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Add the sample images of a step."""
        self.samples[step] = list(samples)

    def add_similarity(self, step: int, nearest: Sequence[NearestImage]) -> None:
        """Add the nearest training image of each sample of a step."""
        self.nearest[step] = list(nearest)

    def add_drift(self, step: int, value: float) -> None:
        """Add how far unrelated prompts have moved from the base."""
        self.drift[step] = _finite(value)

    def add_warning(self, step: int, text: str) -> None:
        """Add a line for the user, once."""
        if text not in [warning.text for warning in self.warnings]:
            self.warnings.append(Warned(step, text))

    def evaluations_of(self, name: str) -> list[Evaluation]:
        """The evaluations of this name by step."""
        found = [item for item in self.evaluations if item.name == name]
        return sorted(found, key=lambda item: item.step)

    def save(self, path: Path) -> None:
        """Write the history as JSON; raises OSError."""
        write_text(path, json.dumps(self.as_json(), ensure_ascii=False, allow_nan=False) + "\n")

    def as_json(self) -> dict[str, Any]:
        """The history as JSON's types; restore() reads it."""
        return {
            "version": 1,
            "first_step": self.first_step,
            "loss": self.losses,
            "gradient_norm": self.gradient_norms,
            "learning_rates": self.learning_rates,
            "evaluations": [asdict(item) for item in self.evaluations],
            "samples": _lists_as_json(self.samples),
            "nearest": _lists_as_json(self.nearest),
            "drift": [[step, value] for step, value in self.drift.items()],
            "warnings": [asdict(item) for item in self.warnings],
        }


def restore(checkpoint: Path | None, step: int) -> RunHistory:
    """The history in a checkpoint, up to its step; a new one without a checkpoint.

    Earlier checkpoints have none, and a damaged one is no reason not to resume: the history then
    begins after the step.
    """
    path = checkpoint / HISTORY if checkpoint else None
    if path is None or not path.exists():
        return RunHistory(step + 1)
    try:
        content = read_json(path)
    except (OSError, UserError) as error:
        log.info("%s; the curves begin at step %d", summarize_error(error), step + 1)
        return RunHistory(step + 1)
    if not _is_history(content):
        log.info("%s is damaged; the curves begin at step %d", path, step + 1)
        return RunHistory(step + 1)
    history = _from_json(content, step)
    return history if history.last_step == step else RunHistory(step + 1)


def _from_json(content: Mapping[str, Any], step: int) -> RunHistory:
    history = RunHistory(content["first_step"])
    count = max(0, step - history.first_step + 1)
    history.losses = content["loss"][:count]
    history.gradient_norms = content["gradient_norm"][:count]
    history.learning_rates = content["learning_rates"][:count]
    for loss in history.losses:
        history.smoothed.add(loss)
    evaluations = [item for item in content["evaluations"] if item["step"] <= step]
    history.evaluations = [
        Evaluation(item["step"], item["name"], item["loss"], tuple(item["by_bin"]))
        for item in evaluations
    ]
    for key, items in content["samples"]:
        if key <= step:
            history.samples[key] = [Sample(**item) for item in items]
    for key, items in content["nearest"]:
        if key <= step:
            history.nearest[key] = [NearestImage(**item) for item in items]
    history.drift = {key: value for key, value in content["drift"] if key <= step}
    history.warnings = [Warned(**item) for item in content["warnings"] if item["step"] <= step]
    return history


def _lists_as_json(lists: Mapping[int, Sequence[Any]]) -> list[list[Any]]:
    return [[step, [asdict(item) for item in items]] for step, items in lists.items()]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


_is_step = schema.whole(0, 10**12)
_is_text = schema.text(100_000)
_is_number = schema.number(-1e300, 1e300)
_is_scalar = schema.instance(str, int, float)


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _has_one_value_a_step(content: Mapping[str, Any]) -> bool:
    counts = {len(content[name]) for name in ("loss", "gradient_norm", "learning_rates")}
    return len(counts) == 1


_is_evaluation = schema.record(
    {
        "step": _is_step,
        "name": schema.one_of(*EVALUATIONS),
        "loss": _is_number_or_none,
        "by_bin": schema.list_of(_is_number_or_none),
    },
    exact=True,
)
_is_sample = schema.record(
    {"file": _is_text, "prompt": _is_text, "seed": _is_number},
    optional={"negative_prompt": _is_text, "settings": schema.mapping(_is_scalar)},
    exact=True,
)
_is_nearest = schema.record(
    {"sample": _is_text, "image": _is_text, "distance": _is_number},
    optional={"is_warning": schema.instance(bool)},
    exact=True,
)
_is_record = schema.record(
    {
        "first_step": _is_step,
        "loss": schema.list_of(_is_number_or_none),
        "gradient_norm": schema.list_of(_is_number_or_none),
        "learning_rates": schema.list_of(schema.list_of(_is_number)),
        "evaluations": schema.list_of(_is_evaluation),
        "samples": schema.list_of(schema.row(_is_step, schema.list_of(_is_sample))),
        "nearest": schema.list_of(schema.row(_is_step, schema.list_of(_is_nearest))),
        "drift": schema.list_of(schema.row(_is_step, _is_number_or_none)),
        "warnings": schema.list_of(schema.record({"step": _is_step, "text": _is_text}, exact=True)),
    }
)


def _is_history(content: Any) -> bool:
    return _is_record(content) and _has_one_value_a_step(content)

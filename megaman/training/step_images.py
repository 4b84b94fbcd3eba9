"""How many images an optimizer step takes, whatever the number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megaman.errors import UserError, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megaman.config.settings import TrainConfig
    from megaman.training.checkpoint import TrainState

# The settings of a checkpoint that say how many.
IMAGES, IMAGES_OF_BUCKET = "pictures a step", "pictures of one bucket"


class StepImages(NamedTuple):
    """A step is accumulation_steps batches of batch_size images, which the processes share; at_once
    is the most that a process computes in one micro-batch."""

    batch_size: int
    accumulation_steps: int
    at_once: int

    @property
    def count(self) -> int:
        """Images of a step."""
        return self.batch_size * self.accumulation_steps

    def settings(self, has_buckets: bool) -> dict[str, int | None]:
        """What a resumed run has to share."""
        return {IMAGES: self.count, IMAGES_OF_BUCKET: self.batch_size if has_buckets else None}

    def summary(self, world_size: int) -> str:
        """How the images come about: 4 x 2 accumulated x 2 processes."""
        at_once = min(self.at_once, max(1, self.batch_size // world_size))
        accumulated, rest = divmod(self.count, at_once * world_size)
        processes = plural(world_size, "process", "es")
        if rest:
            return f"at most {at_once} at once in {processes}"
        return f"{at_once} x {accumulated} accumulated x {processes}"


def plan_step_images(
    config: TrainConfig, world_size: int, saved: TrainState | None
) -> tuple[StepImages, int, str]:
    """The images of a step, the number of processes that the flags mean, and a line about it or "".

    The flags say how many images each process computes. A run that is resumed with another number
    of processes keeps the images of its steps: the flags mean the processes that it began with.

    Raises UserError if the images of a step cannot be shared out evenly between the processes.
    """
    planned = _by_flags(config, world_size)
    if saved is None or saved.world_size is None:
        return planned, world_size, ""
    has_buckets = config.buckets.enable_bucket
    if _fits(planned.settings(has_buckets), saved.settings):
        return planned, world_size, ""
    kept = _by_flags(config, saved.world_size)
    if saved.world_size == world_size or not _fits(kept.settings(has_buckets), saved.settings):
        return planned, world_size, ""  # other flags, which is refused with the other settings
    if kept.count % world_size:
        raise UserError(
            f"A step of this run has {plural(kept.count, 'image')}, which {world_size} processes "
            "cannot share evenly",
            f"Start {_divisors(kept.count)} processes",
        )
    accumulated, rest = divmod(kept.count, kept.at_once * world_size)
    if not has_buckets and not rest:  # as a new run with so many processes
        kept = StepImages(kept.at_once * world_size, accumulated, kept.at_once)
    began = plural(saved.world_size, "process", "es")
    line = (
        f"resumed    {plural(kept.count, 'image')} a step as with {began}: "
        f"{kept.summary(world_size)}"
    )
    return kept, saved.world_size, line


def _by_flags(config: TrainConfig, world_size: int) -> StepImages:
    optimizer = config.optimizer
    size = optimizer.train_batch_size
    return StepImages(size * world_size, optimizer.gradient_accumulation_steps, size)


def _fits(settings: Mapping[str, int | None], saved: Mapping[str, int | None]) -> bool:
    return all(saved.get(key, value) == value for key, value in settings.items())


def _divisors(count: int) -> str:
    """The numbers that divide a count, up to eight of them."""
    numbers = [str(number) for number in range(1, min(count, 64) + 1) if count % number == 0]
    return " or ".join(numbers[:8])

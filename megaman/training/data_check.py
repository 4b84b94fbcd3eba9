"""--check_data: a report on a run's images and captions; loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.doctor.folders import check_folders
from megaman.training.datasets import find_datasets

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig


def check_data(
    config: TrainConfig, progress_bar: Callable[..., Iterable[Any]]
) -> tuple[list[str], int]:
    """Check the folders of a run and write the reports; returns the summaries as lines for the
    console, and the exit code."""
    datasets, resolution = find_datasets(config), config.data.resolution
    if datasets is None:
        return [], int(config.run.strict)  # a check should find that there are no images
    if config.captions.auto_caption:
        bar = partial(progress_bar, desc="captioning", unit="image")
        datasets.write_captions(config.captions.auto_caption, bar)
        datasets.reload()
    if config.buckets.enable_bucket:  # no base is read: the limits are those of SD 1.5 or smaller
        datasets.set_buckets(min(512, resolution), config.buckets)
    bar = partial(progress_bar, desc="looking", unit="image")
    trigger, output_dir = config.captions.trigger_word or None, Path(config.output.output_dir)
    lines, is_wrong = check_folders(
        datasets.images, datasets.class_images, resolution, trigger, output_dir, bar
    )
    return lines, int(config.run.strict and is_wrong)

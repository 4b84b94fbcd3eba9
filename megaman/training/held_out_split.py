"""Which images are held out: a share of the images to learn, or those of a folder of their own. No
near-duplicate of an image that is trained on is among them. Loads no torch."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import WRONG_USAGE, UserError
from megaman.files import read_json
from megaman.training.output import STATE

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.data.dataset import MegaManDataset
    from megaman.training.datasets import Datasets
    from megaman.training.output import OutputFolder

MIN_IMAGES = 8  # to split: with fewer, every one is needed
MIN_HELD_OUT = 2
SUGGESTED_FROM = 20  # images
FEW_IMAGES = 500  # are decoded before another process would pay
MAX_SHOWN = 3  # names in a line

log = logging.getLogger(__name__)


def prepare_datasets(config: TrainConfig, output: OutputFolder) -> Datasets | None:
    """The datasets of a run, checked, without what is held out; None if there are no images."""
    from megaman.training.datasets import find_datasets  # main reports a missing Pillow

    datasets = find_datasets(config)
    if datasets is not None:
        datasets.check(output.path, config.data.skip_bad_images)
        hold_out_images(config, datasets, output.checkpoint)
    return datasets


def hold_out_images(config: TrainConfig, datasets: Datasets, checkpoint: Path | None) -> None:
    """Take the held-out images out of those to learn, or read their folder.

    A resumed run holds out the same ones. Raises UserError if there are too few, or if an image is
    trained on and held out.
    """
    if not config.evaluation.is_on:
        if len(datasets.images) >= SUGGESTED_FROM:
            log.info("--validation_split 0.1 would show overfitting: loss on images held out")
        return
    _check_folder(config)
    names = saved_names(checkpoint)
    if names is not None:
        _hold_out_again(datasets, names, checkpoint)
    elif datasets.load_held_out is not None:
        _hold_out_folder(config, datasets, datasets.load_held_out())
    else:
        _split(config, datasets)


def _check_folder(config: TrainConfig) -> None:
    folder = config.evaluation.validation_data_dir
    if folder is not None and not Path(folder).is_dir():
        raise UserError(
            f"--validation_data_dir {folder} is not a folder",
            "Name one with images that are not trained on",
            WRONG_USAGE,
        )


def saved_names(checkpoint: Path | None) -> list[str] | None:
    """The names of the held-out images in a checkpoint; None if it has none."""
    if checkpoint is None:
        return None
    content = read_json(checkpoint / STATE)
    names = content.get("held_out") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return names


def _hold_out_again(datasets: Datasets, names: Sequence[str], checkpoint: Path | None) -> None:
    datasets.hold_out(names)
    if missing := sorted(set(names) - set(datasets.held_out_names)):
        raise UserError(
            f"{checkpoint} holds out {_shorten(missing)}, which cannot be used now",
            "Restore it, or start a new run in another --output_dir",
            WRONG_USAGE,
        )


def _hold_out_folder(config: TrainConfig, datasets: Datasets, held_out: MegaManDataset) -> None:
    """Hold out the images of --validation_data_dir, but near-duplicates of those to learn."""
    place = f"--validation_data_dir {config.evaluation.validation_data_dir}"
    if not len(held_out):
        raise UserError(
            f"{place} holds no image that can be used",
            "Put JPG, PNG, BMP or WebP there",
            WRONG_USAGE,
        )
    _refuse_copies(place, datasets, held_out)
    training = range(len(datasets.images))
    offset = len(training)
    pairs = _near_duplicates([*_paths(datasets.images), *_paths(held_out)], config.data.resolution)
    alike = {
        second - offset for first, second in pairs if first in training and second not in training
    }
    names = [held_out.name(index) for index in range(len(held_out))]
    similar = [names[index] for index in sorted(alike)]
    if len(similar) == len(names):
        raise UserError(
            f"Every image in {place} is nearly one of those to learn", "Name others", WRONG_USAGE
        )
    if similar:
        log.info(
            "%s: %s not used, as nearly the same is trained on: %s",
            place,
            "1 image is" if len(similar) == 1 else f"{len(similar)} images are",
            _shorten(similar),
        )
    datasets.hold_out(set(names) - set(similar))


def _refuse_copies(place: str, datasets: Datasets, held_out: MegaManDataset) -> None:
    """Raise UserError if an image is in both folders, byte for byte."""
    images, file_index = datasets.images, datasets.file_index
    digests = images.hash_files(file_index)  # first, as it drops what cannot be read
    learned = dict(zip(digests, _names(images), strict=True))
    digests = held_out.hash_files(file_index)
    for digest, name in zip(digests, _names(held_out), strict=True):
        if digest in learned:
            raise UserError(
                f"{place}: {name} is an image to learn, {learned[digest]}",
                "Remove it from one of the folders",
                WRONG_USAGE,
            )


def _split(config: TrainConfig, datasets: Datasets) -> None:
    """Hold out --validation_split of the images, evenly over folders and captions."""
    images, share = datasets.images, config.evaluation.validation_split or 0
    if len(images) < MIN_IMAGES:
        raise UserError(
            f"{_asked_by(config)}: {len(images)} images are too few to hold some out, as "
            f"every one is needed to learn ({MIN_IMAGES} at least)",
            "Add images, or name others in --validation_data_dir",
            WRONG_USAGE,
        )
    pairs = _near_duplicates(_paths(images), config.data.resolution)
    copied = {index for pair in pairs for index in pair}
    candidates = [index for index in range(len(images)) if index not in copied]
    count = min(max(MIN_HELD_OUT, round(share * len(images))), len(images) - MIN_HELD_OUT)
    if len(candidates) < MIN_HELD_OUT:
        raise UserError(
            "--validation_split: nearly every image has a near-duplicate, which would be trained "
            "on",
            "Remove the copies (--check_data lists them), or name other images in "
            "--validation_data_dir",
            WRONG_USAGE,
        )
    chosen = choose(images, candidates, count, config.run.seed or 0)
    datasets.hold_out({images.name(index) for index in chosen})


def _asked_by(config: TrainConfig) -> str:
    """The flag because of which images are held out."""
    if "validation_split" in config.explicit:
        return "--validation_split"
    if "early_stopping_patience" in config.explicit:
        return "--early_stopping_patience"
    return "--max_train_steps auto"


def choose(images: MegaManDataset, candidates: Sequence[int], count: int, seed: int) -> list[int]:
    """At most count of the candidates: spread evenly over all, sorted by folder and caption, so
    that each folder and each kind of caption has its share; the seed decides where it begins."""
    rng = random.Random(f"held out {seed}")
    order = list(candidates)
    rng.shuffle(order)  # images with the same caption
    order.sort(
        key=lambda index: (str(images.examples[index].folder), images.examples[index].caption)
    )
    start = rng.random()
    count = min(count, len(order))
    return sorted(order[int((start + i) * len(order) / count)] for i in range(count))


def _near_duplicates(images: Sequence[Path], resolution: int) -> list[tuple[int, int]]:
    """The pairs of near-duplicates by index; an image that cannot be decoded has none."""
    import numpy as np

    from megaman.doctor.duplicates import near_duplicates
    from megaman.doctor.image_stats import measure_images

    thumbnails, indices = [], []
    num_processes = 1 if len(images) <= FEW_IMAGES else None
    for index, stats in enumerate(measure_images(list(images), resolution, num_processes)):
        if stats.thumbnail is not None:
            thumbnails.append(stats.thumbnail)
            indices.append(index)
    if not thumbnails:
        return []
    pairs = near_duplicates(np.stack(thumbnails))
    return [(indices[pair.first], indices[pair.second]) for pair in pairs]


def _paths(dataset: MegaManDataset) -> list[Path]:
    return [example.image for example in dataset.examples]


def _names(dataset: MegaManDataset) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


def _shorten(names: Sequence[str]) -> str:
    """The first names, and how many there are in addition."""
    shown = ", ".join(names[:MAX_SHOWN])
    return shown if len(names) <= MAX_SHOWN else f"{shown} and {len(names) - MAX_SHOWN} more"

"""Is it memorized? The training image nearest to each sample image, and how far unrelated prompts
have moved from the base."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megaman.data import similarity
from megaman.data.images import BadImageError
from megaman.data.similarity import SIDE, TrainingImages, describe_all, make_training_images
from megaman.doctor.duplicates import near_duplicates
from megaman.errors import summarize_error
from megaman.sequences import spread
from megaman.training.history import NearestImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from megaman.config.image_settings import DataConfig
    from megaman.data.clip_features import ClipFeatures
    from megaman.data.dataset import MegaManDataset
    from megaman.training.datasets import Datasets
    from megaman.training.run import Run

THUMBNAIL_SIDE = 3 * SIDE  # of the images in which near-duplicates are sought
NUM_THREADS = 4  # that decode images
REMEDY = "fewer steps, a lower --lora_rank or more images help"

log = logging.getLogger(__name__)


@lru_cache(2)  # for the checks during the run and for the LoRA's folder
def describe_images(
    images: MegaManDataset,
    held_out: MegaManDataset | None,
    num_crops: int,
    seed: int,
    clip: ClipFeatures | None = None,
) -> TrainingImages:
    """The descriptors of a run's training images: of all of their crops, or of some if there are
    many. Images that cannot be read are skipped.

    Args:
        held_out: images of the same kind that are not trained on.
        num_crops: random crops of an image, at most.
        seed: of the run, from which the crops follow.
        clip: the model by whose features they are described, None for pixels.
    """
    names, crops = _small_crops(images, num_crops, seed, THUMBNAIL_SIDE)
    image_of = [[index] * len(own) for index, own in enumerate(crops)]
    whole = np.stack([own[0] for own in crops]) if crops else _none()
    pairs = {(pair.first, pair.second) for pair in near_duplicates(whole)}
    others = _small_crops(held_out, 1, seed, THUMBNAIL_SIDE)[1] if held_out is not None else []
    if clip is None:
        descriptors = _shrink(np.concatenate(crops) if crops else _none())
        held_out_descriptors = _shrink(np.concatenate(others)) if others else None
    else:
        descriptors = _features(clip, images, num_crops, seed)
        held_out_descriptors = _features(clip, held_out, 1, seed) if held_out else None
    return make_training_images(
        names,
        descriptors,
        np.asarray([index for own in image_of for index in own], np.int32),
        pairs,
        held_out_descriptors,
        describe_all if clip is None else clip,
    )


def _features(
    clip: ClipFeatures, dataset: MegaManDataset, num_crops: int, seed: int
) -> NDArray[np.float16]:
    """CLIP's features [N, D] of the images' crops, in the order of `_small_crops`."""
    crops = _small_crops(dataset, num_crops, seed, clip.side)[1]
    return clip([Image.fromarray(crop) for own in crops for crop in own])


def _none() -> NDArray[np.uint8]:
    return np.zeros((0, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)


def _shrink(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Thumbnails [N, 48, 48, 3] as descriptors [N, SIDE, SIDE, 3]."""
    factor = THUMBNAIL_SIDE // SIDE
    cells = thumbnails.reshape(-1, SIDE, factor, SIDE, factor, 3)
    return cells.mean((2, 4)).round().astype(np.uint8)


def _small_crops(
    dataset: MegaManDataset, num_crops: int, seed: int, side: int
) -> tuple[list[str], list[NDArray[np.uint8]]]:
    """The names of the images, at most MAX_DESCRIPTORS evenly spaced, and the crops of each, uint8
    [crops, side, side, 3]."""
    indices = spread(range(len(dataset)), similarity.MAX_DESCRIPTORS)
    load = partial(
        _load_crops,
        dataset,
        num_crops=max(1, min(num_crops, similarity.MAX_DESCRIPTORS // max(len(indices), 1))),
        seed=seed,
        side=side,
    )
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        loaded = list(pool.map(load, indices))
    found = [(dataset.name(i), crops) for i, crops in zip(indices, loaded, strict=True)]
    kept = [(name, crops) for name, crops in found if crops is not None]
    return [name for name, _ in kept], [crops for _, crops in kept]


def _load_crops(
    dataset: MegaManDataset, index: int, num_crops: int, seed: int, side: int
) -> NDArray[np.uint8] | None:
    try:
        crops = dataset.get_crops(index, num_crops, False, seed)
        small = dataset.load_small_crops(index, crops, side)
    except (BadImageError, OSError):
        return None
    return np.stack([np.asarray(image, np.uint8) for image in small])


def describe_datasets(
    datasets: Datasets, config: DataConfig, seed: int, clip_model: str | None = None
) -> TrainingImages:
    """The descriptors of a run's training images (`describe_images`); clip_model is the folder of a
    CLIP model, None for pixels."""
    num_crops = 1 if config.center_crop else config.crop_variants
    clip = None if clip_model is None else load_clip(clip_model)
    return describe_images(datasets.images, datasets.held_out, num_crops, seed, clip)


@lru_cache(1)
def load_clip(folder: str) -> ClipFeatures:
    """A CLIP model, loaded once in a run; raises UserError if there is none."""
    from megaman.data.clip_features import ClipFeatures

    return ClipFeatures(Path(folder))


def make_memorization_check(
    datasets: Datasets, config: DataConfig, clip_model: str | None, run: Run
) -> MemorizationCheck | None:
    """The check of a run's sample images; None, after a line, if its images cannot be described."""
    try:
        images = describe_datasets(datasets, config, run.state.seed, clip_model)
    except Exception as error:  # an extra never stops the run
        log.info("no nearest training images (%s)", summarize_error(error))
        return None
    return MemorizationCheck(images, datasets.images.data_dir.as_posix(), run)


class MemorizationCheck:
    """Compares the sample images of a run with its training images."""

    def __init__(self, images: TrainingImages, data_dir: str, run: Run):
        self._images, self._data_dir, self._run = images, data_dir, run

    def check(self, step: int, samples: Mapping[str, Image.Image]) -> None:
        """Note the nearest training image of each sample image of a step, by its file, and warn
        once if one is suspiciously near. The base itself, at step 0, has memorized nothing."""
        found = self._images.nearest(list(samples.values()))
        nearest = [
            NearestImage(
                sample=file,
                image=f"{self._data_dir}/{self._images.names[item.index]}",
                distance=round(item.distance, 2),
                is_warning=item.is_near and step > 0,
            )
            for file, item in zip(samples, found, strict=True)
        ]
        if not nearest:
            return
        run = self._run
        run.history.add_similarity(step, nearest)
        least = min(item.distance for item in nearest)
        run.log.add("add_scalar", "validation/nearest_training_image", least, step)
        self._warn(step, [item for item in nearest if item.is_warning])

    def _warn(self, step: int, near: Sequence[NearestImage]) -> None:
        history = self._run.history
        if not near or any(REMEDY in warning.text for warning in history.warnings):
            return
        text = (
            f"{near[0].sample} is nearer to {near[0].image} than nearly all training images are to "
            f"each other: the LoRA may have memorized it; {REMEDY}"
        )
        log.info("step %d: %s", step, text)
        history.add_warning(step, text)

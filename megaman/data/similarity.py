"""How near an image is to the images that were trained on, without a model: pixels at 16 x 16,
shifted and mirrored.

A descriptor is an image, whole or the crop that was trained on, squeezed to 16 x 16 by area
averages. The distance of two is the root mean square of their differences in levels of 255, the
least over shifts by one cell and mirroring.

The scale is the training set's own. For each image, how near is the nearest other one that is no
near-duplicate? A generated image is suspicious if it is nearer to a training image than LIMIT of
those are to each other, and than any held-out image is to one: those cannot be memorized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megaman.errors import UserError
from megaman.safe_loading import read_metadata

if TYPE_CHECKING:
    from numpy.typing import NDArray

# In a LoRA's folder: descriptors of pixels and, if a run has a CLIP model, CLIP's features.
FILE, CLIP_FILE = "training_images.safetensors", "training_images_clip.safetensors"
SIDE = 16
LIMIT = 5  # percent: a twentieth
HELD_OUT_SHARE = 0.95  # of the nearest held-out image's distance: scaling costs a few levels
MAX_DESCRIPTORS = 1300  # that are stored: 1 MB
MAX_NAME = 1000  # characters of an image's path in a stranger's file
ROWS = 64  # images compared at a time, which limits the memory


class Nearest(NamedTuple):
    """The training image that is nearest to another image, by its index in names."""

    index: int
    distance: float
    is_near: bool  # suspiciously


Describe = Callable[[Sequence[Image.Image]], "NDArray[Any]"]  # descriptors [N, ...] of images


def describe(image: Image.Image) -> NDArray[np.uint8]:
    """The descriptor of an image, uint8 [SIDE, SIDE, 3]."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.uint8)


def describe_all(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """The descriptors of images, uint8 [N, SIDE, SIDE, 3]."""
    return np.stack([describe(image) for image in images])


def distances(ones: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
    """The distance of each of N descriptors from each of M, [N, M].

    Of features of CLIP, which are rows of length 1, it is 100 times the cosine distance.
    """
    if others.ndim == 2:
        return (100 * (1 - ones.astype(np.float32) @ others.astype(np.float32).T)).clip(0)
    flat = _flat(others)
    squares = (flat**2).sum(1)
    nearest = np.full((len(ones), len(others)), np.inf, np.float32)
    for start in range(0, len(ones), ROWS):
        rows = nearest[start : start + ROWS]
        for view in _views(ones[start : start + ROWS]):
            seen = _flat(view)
            found = ((seen**2).sum(1)[:, None] + squares - 2 * seen @ flat.T) / flat.shape[1]
            np.minimum(rows, found, out=rows)
    return np.sqrt(nearest.clip(0))


def _flat(descriptors: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of numbers around 0, which keeps the squares and their rounding errors small."""
    return descriptors.reshape(len(descriptors), 3 * SIDE**2).astype(np.float32) - 127.5


def _views(descriptors: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The descriptors shifted by up to one cell in each direction, and mirrored."""
    views = []
    for upright in (descriptors, descriptors[:, :, ::-1]):
        padded = np.pad(upright, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        for top in range(3):
            for left in range(3):
                views.append(padded[:, top : top + SIDE, left : left + SIDE])
    return views


@dataclass(frozen=True)
class TrainingImages:
    """The descriptors of the images that a LoRA was trained on.

    names are the images' paths below the folder of training images, image_of the index in names
    of each descriptor: an image may have several crops. limit is the distance below which another
    image is suspiciously near; None if the images are too few or too much alike to tell.
    """

    names: Sequence[str]
    descriptors: NDArray[Any]
    image_of: NDArray[np.int32]
    limit: float | None
    describe: Describe = describe_all  # what made the descriptors

    def nearest(self, images: Sequence[Image.Image]) -> list[Nearest]:
        """The nearest training image of each of these images."""
        if not images or not len(self.descriptors):
            return []
        found = distances(self.describe(images), self.descriptors)
        nearest = []
        for row, column in enumerate(found.argmin(1)):
            distance = float(found[row, column])
            is_near = self.limit is not None and distance < self.limit
            nearest.append(Nearest(int(self.image_of[column]), distance, is_near))
        return nearest

    def as_bytes(self) -> bytes:
        """The content of a safetensors file that `load` reads."""
        header = {"names": json.dumps(list(self.names)), "side": str(SIDE)}
        if self.limit is not None:
            header["limit"] = repr(self.limit)
        return save({"descriptors": self.descriptors, "image_of": self.image_of}, header)


def make_training_images(
    names: Sequence[str],
    descriptors: NDArray[Any],
    image_of: NDArray[np.int32],
    alike: Collection[tuple[int, int]],
    held_out: NDArray[Any] | None = None,
    describe: Describe = describe_all,
) -> TrainingImages:
    """Descriptors with the limit that follows from them.

    alike are pairs of near-duplicates, by index in names; held_out are descriptors of images of
    the same kind that are not trained on; describe is what made the descriptors.
    """
    limit = _find_limit(descriptors, image_of, alike)
    if limit is not None and held_out is not None and len(held_out):
        limit = min(limit, HELD_OUT_SHARE * float(distances(held_out, descriptors).min()))
    return TrainingImages(names, descriptors, image_of, limit, describe)


def _find_limit(
    descriptors: NDArray[Any], image_of: NDArray[np.int32], alike: Collection[tuple[int, int]]
) -> float | None:
    """The distance from their nearest other image that LIMIT percent of the images fall below."""
    if not len(descriptors):
        return None
    found = distances(descriptors, descriptors)
    found[image_of[:, None] == image_of] = np.inf
    for first, second in alike:
        for one, other in ((first, second), (second, first)):
            found[np.ix_(image_of == one, image_of == other)] = np.inf
    nearest = found.min(1)
    by_image = [nearest[image_of == index].min() for index in np.unique(image_of)]
    finite = [distance for distance in by_image if np.isfinite(distance)]
    return float(np.percentile(finite, LIMIT)) if finite else None


def load(path: Path, describe: Describe = describe_all) -> TrainingImages:
    """The training images in a file, which may come from a stranger; describe is what made its
    descriptors. Raises UserError if it is missing or damaged."""
    header = read_metadata(path)
    try:
        with safe_open(path, "np") as file:
            descriptors, image_of = file.get_tensor("descriptors"), file.get_tensor("image_of")
        names = json.loads(header["names"])
        limit = float(header["limit"]) if "limit" in header else None
    except (SafetensorError, ValueError, KeyError, RecursionError):
        raise _damaged(path) from None
    is_pixels = descriptors.dtype == np.uint8 and descriptors.shape[1:] == (SIDE, SIDE, 3)
    is_clip = descriptors.dtype == np.float16 and descriptors.ndim == 2
    is_valid = (
        (is_pixels if describe is describe_all else is_clip and np.isfinite(descriptors).all())
        and len(descriptors) <= MAX_DESCRIPTORS
        and image_of.dtype == np.int32
        and image_of.shape == (len(descriptors),)
        and isinstance(names, list)
        and all(isinstance(name, str) and len(name) <= MAX_NAME for name in names)
        and all(0 <= index < len(names) for index in image_of.tolist())
    )
    if not is_valid:
        raise _damaged(path)
    return TrainingImages(names, descriptors, image_of, limit, describe)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged", "Delete it: only the nearest training images need it")

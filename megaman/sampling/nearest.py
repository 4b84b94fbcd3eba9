"""The training images that are nearest to generated ones, for the gallery.

A LoRA's folder holds small descriptors of the images that it was trained on. The images themselves
are shown if they are still where the run's training_config.json says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.data.images import BadImageError, open_image
from megaman.data.similarity import CLIP_FILE, FILE, Describe, TrainingImages, describe_all, load
from megaman.errors import UserError
from megaman.files import is_inside, is_network, read_json, replacing
from megaman.lora import peft_config
from megaman.pages.gallery import THUMBNAILS
from megaman.pages.gallery_images import NearestImage

if TYPE_CHECKING:
    from PIL import Image

PREVIEW = 128  # pixels of the longer side

log = logging.getLogger(__name__)


class NearestImages:
    """Finds the nearest training images of one LoRA, of the first of several that has descriptors.

    It finds none if no LoRA has any. clip_model is the folder of a CLIP model whose features are
    compared if the LoRA's folder has them; otherwise pixels are. Raises UserError if it holds no
    such model.
    """

    def __init__(self, loras: Sequence[Path], clip_model: str | None = None):
        self._images, self._data_dir = None, None
        if clip_model is not None:
            features = load_clip(clip_model)
            self._images, self._data_dir = _find(loras, CLIP_FILE, features)
            if self._images is None:
                log.info("--clip_model: no LoRA has features of CLIP, pixels are compared")
        if self._images is None:
            self._images, self._data_dir = _find(loras, FILE, describe_all)

    def find(self, folder: Path, file: str, image: Image.Image) -> NearestImage | None:
        """The training image nearest to an image that has this file name in a gallery's folder, and
        a preview of it in there."""
        if self._images is None:
            return None
        try:
            found = self._images.nearest([image])
        except ValueError:  # features of another CLIP model
            log.info("--clip_model is another model than that of the LoRA's training images")
            self._images = None
            return None
        if not found:
            return None
        nearest = found[0]
        name = self._images.names[nearest.index]
        return NearestImage(
            name=name,
            distance=round(nearest.distance, 1),
            is_near=nearest.is_near,
            preview=self._write_preview(folder, f"{THUMBNAILS}/{file}.nearest.webp", name),
        )

    def _write_preview(self, folder: Path, file: str, name: str) -> str | None:
        """The file of the preview, or None if the training image is not there any more."""
        if self._data_dir is None or not is_inside(str(self._data_dir / name), str(self._data_dir)):
            return None
        try:
            image = open_image(self._data_dir / name, min_side=PREVIEW)
            image.thumbnail((PREVIEW, PREVIEW))
            with replacing(folder / file) as aside:
                image.save(aside, format="WEBP", quality=80)
        except (BadImageError, OSError):
            return None
        return file


@lru_cache(1)
def load_clip(folder: str) -> Describe:
    """The features of a CLIP model, loaded once."""
    from megaman.data.clip_features import ClipFeatures  # loads torch

    return ClipFeatures(Path(folder))


def _find(
    loras: Sequence[Path], file: str, describe: Describe
) -> tuple[TrainingImages | None, Path | None]:
    """The descriptors of the first LoRA that has such a file, and the folder of its training images
    if that is known."""
    for path in loras:
        found = peft_config.find(path)
        folder = found if found.is_dir() else found.parent
        for place in (folder, folder.parent / "lora_weights"):  # a checkpoint's run, once finished
            if not (place / file).is_file():
                continue
            try:
                return load(place / file, describe), _data_dir(
                    place.parent / "training_config.json"
                )
            except (UserError, OSError) as error:
                log.info(f"no nearest training images: {error}")
    return None, None


def _data_dir(config: Path) -> Path | None:
    """The folder of training images that a run's settings name, if it is on this machine."""
    try:
        content = read_json(config)
        name = content["settings"]["data_dir"]
    except (UserError, OSError, KeyError, TypeError):
        return None
    if not isinstance(name, str) or is_network(name) or not Path(name).is_dir():
        return None
    return Path(name)

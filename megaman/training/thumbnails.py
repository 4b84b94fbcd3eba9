"""Small copies of training images for the page of a run, made once. Needs no torch."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from PIL import Image

from megaman.data.images import BadImageError, open_image
from megaman.errors import summarize_error
from megaman.files import replacing
from megaman.pages.training_page import FOLDER

SIDE = 192  # pixels of the longer side
TINY = 96  # pixels; smaller images are kept as they are, so that their pixels stay sharp

log = logging.getLogger(__name__)


class Thumbnails:
    """The small copies in a run's folder, under names made from the images' paths."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._made: dict[Path, str | None] = {}

    def of(self, image: Path) -> str | None:
        """The path of an image's copy relative to the folder, with forward slashes; None if none
        could be made."""
        if image not in self._made:
            self._made[image] = self._make(image)
        return self._made[image]

    def _make(self, image: Path) -> str | None:
        digest = hashlib.blake2b(str(image.resolve()).encode("utf-8", "replace"), digest_size=8)
        file = f"{FOLDER}/images/{digest.hexdigest()}.webp"
        path = self._folder / file
        try:
            if not path.exists() or path.stat().st_mtime < image.stat().st_mtime:
                small = open_image(image, min_side=SIDE)
                is_tiny = max(small.size) <= TINY
                small.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
                with replacing(path, lasting=False) as aside:
                    small.save(aside, "WEBP", lossless=is_tiny, quality=80, method=2)
        except (OSError, BadImageError) as error:
            log.debug("no small copy of %s (%s)", image, summarize_error(error))
            return None
        return file

"""Saves generated images under their names, each with its record, and finds the training image that
is nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import UserError
from megaman.pages.gallery_images import GalleryImage, NearestImage
from megaman.sampling import records
from megaman.sampling.jobs import (
    Job,
    LoraVariant,
    PendingBatch,
    base_image_file,
    image_file,
    pixel_image_file,
)

if TYPE_CHECKING:
    from PIL import Image

    from megaman.sampling.generator import GeneratedImage
    from megaman.sampling.nearest import NearestImages
    from megaman.sampling.records import Record, Recorder


def refuse_taken(path: Path) -> None:
    """Raise UserError if an image has this name by now: it was free when the run began."""
    if path.exists():
        raise UserError(
            f"{path} was written by another run in the meantime",
            "Give each run its own --output_dir",
        )


def _make_finder(loras: Sequence[Path], clip_model: str | None) -> NearestImages:
    from megaman.sampling.nearest import NearestImages  # loads numpy

    return NearestImages(loras, clip_model)


def save_pixel_art(path: Path, record: Record, image: Image.Image) -> None:
    """Save the pixel art next to the image at a path, with the image's record."""
    from megaman.sampling.snap import snap  # loads numpy

    pixel_art = snap(image, record.pixel_art, record.palette or ())
    records.save(path.with_name(pixel_image_file(path.name)), pixel_art, record)


@dataclass(frozen=True)
class ImageSaver:
    """Saves the images of a run in a folder, in one or in several processes.

    first is the number of the run's first prompt; with compare each image has the base's image
    next to it; for clip_model see `OutputFolder`.
    """

    folder: Path
    first: int
    recorder: Recorder
    compare: bool
    clip_model: str | None
    _finders: dict[tuple[Path, ...], NearestImages] = field(default_factory=dict)

    def path(self, job: Job, variant: LoraVariant, without_lora: bool = False) -> Path:
        """Where the image of a job is, or with without_lora the base's image next to it."""
        file = image_file(job, variant, self.first)
        return self.folder / (base_image_file(file) if without_lora else file)

    def save(
        self,
        group: Sequence[PendingBatch],
        generated: Sequence[GeneratedImage],
        without_lora: bool,
    ) -> list[GalleryImage]:
        """Save the missing images of a group of batches with one variant; returns their entries in
        the gallery, none with without_lora, when they are the base's images next to others.

        Raises UserError if another run took a name.
        """
        jobs = {job for item in group for job in item.jobs_to_save(without_lora)}
        variant = group[0].variant
        entries = []
        for item in generated:
            if item.job not in jobs:
                continue
            path = self.path(item.job, variant, without_lora)
            refuse_taken(path)
            record = self._save(path, item, variant, without_lora)
            if not without_lora:
                base_file = base_image_file(path.name) if self.compare else None
                pixel_file = pixel_image_file(path.name) if record.pixel_art else None
                entry = records.gallery_image(path.name, record, base_file, pixel_file)
                nearest = self._find_nearest(path.name, item, variant)
                entries.append(replace(entry, nearest=nearest))
        return entries

    def _save(
        self, path: Path, generated: GeneratedImage, variant: LoraVariant, without_lora: bool
    ) -> Record:
        record = self.recorder.record(
            generated.job, generated.batch, variant, generated.vae_tile, without_lora
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        records.save(path, generated.image, record)
        if record.pixel_art and not without_lora:
            save_pixel_art(path, record, generated.image)
        return record

    def _find_nearest(
        self, file: str, generated: GeneratedImage, variant: LoraVariant
    ) -> NearestImage | None:
        """The training image nearest to an image with a LoRA; None if no LoRA knows its images."""
        paths = tuple(path for _, path, strength in variant.loras if strength * variant.scale)
        if paths not in self._finders:
            self._finders[paths] = _make_finder(paths, self.clip_model)
        return self._finders[paths].find(self.folder, file, generated.image)

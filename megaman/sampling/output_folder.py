"""The output folder of a generation: images of earlier runs, those of a stopped run, and the
images and the page that this run writes."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from megaman.errors import UserError, plural
from megaman.pages import grid
from megaman.pages.gallery import (
    GalleryImage,
    NearestImage,
    read_images,
    title_of,
    variant_labels,
    write_gallery,
)
from megaman.sampling import png, records
from megaman.sampling.jobs import (
    Job,
    LoraVariant,
    PendingBatch,
    base_image_file,
    image_file,
    pixel_image_file,
)

if TYPE_CHECKING:
    from megaman.sampling.generator import GeneratedImage
    from megaman.sampling.nearest import NearestImages
    from megaman.sampling.records import Record, Recorder

log = logging.getLogger(__name__)

NUMBERED = re.compile(r"megaman_(\d+)_\d+.*\.png")


FindRecord = Callable[[Path], "Record | None"]


def images_on_disk(folder: Path, images: list[GalleryImage]) -> list[GalleryImage]:
    """The gallery's images without those that were deleted, each with its base's image if it is
    there."""

    def exists(file: str) -> bool:  # "./" keeps "//host/x" from naming another machine
        return os.path.isfile(f"{folder}/./{file}")

    present = []
    for image in images:
        if not exists(image.file):
            continue
        base_file = image.base_file or base_image_file(image.file)
        pixel_file = image.pixel_file or pixel_image_file(image.file)
        present.append(
            replace(
                image,
                base_file=base_file if exists(base_file) else None,
                pixel_file=pixel_file if exists(pixel_file) else None,
            )
        )
    return present


def add_unlisted(
    folder: Path, images: list[GalleryImage], find_record: FindRecord = records.find_record
) -> list[GalleryImage]:
    """The gallery's images, and those that a killed run saved before the page listed them."""
    listed = {file for image in images for file in (image.file, image.base_file)}
    unlisted = []
    for path in sorted(folder.glob("megaman_*.png")):
        if path.name in listed or path.name.endswith(("_base.png", "_pixel.png")):
            continue
        record = find_record(path)
        if record and png.is_whole(path):
            base = path.with_name(base_image_file(path.name))
            base_file = base.name if base.is_file() else None
            pixel = path.with_name(pixel_image_file(path.name))
            pixel_file = pixel.name if pixel.is_file() else None
            unlisted.append(records.gallery_image(path.name, record, base_file, pixel_file))
    return [*images, *unlisted]


def first_free(folder: Path) -> int:
    """The first prompt number after those of all images in the folder."""
    names = [path.name for path in folder.glob("megaman_*.png")]
    matches = filter(None, map(NUMBERED.fullmatch, names))
    return max((int(match[1]) for match in matches), default=-1) + 1


def first_of_stopped(
    folder: Path,
    wanted: Sequence[tuple[int, Record]],
    find_record: FindRecord = records.find_record,
) -> int | None:
    """The number of the first prompt in the run that was stopped, or None if there is no image
    of it.

    wanted are the prompt indices with the records that their images would have, also those of the
    base. Each image that fits votes for the number that its own number and index imply.
    """
    indices: dict[tuple, list[int]] = {}
    for prompt_index, record in wanted:
        indices.setdefault(record.identity, []).append(prompt_index)
    votes: Counter[int] = Counter()
    for path in folder.glob("megaman_*.png"):
        match = NUMBERED.fullmatch(path.name)
        if match is None:
            continue
        if record := find_record(path):
            number = int(match[1])
            fitting = indices.get(record.identity, [])
            votes.update({number - index for index in fitting if index <= number})
    return max(votes, key=lambda first: (votes[first], first)) if votes else None


def is_complete(path: Path, record: Record, find_record: FindRecord = records.find_record) -> bool:
    """Whether the image exists and is whole; raises UserError if another one has its name."""
    if not path.exists():
        return False
    found = None if path.is_dir() else find_record(path)
    is_same = found is not None and found.identity == record.identity
    if not path.is_dir() and not png.is_whole(path) and (found is None or is_same):
        return False
    if not is_same:
        raise UserError(
            f"--resume: {path} is not an image that this command generates",
            "Use the flags of the stopped run, or omit --resume",
        )
    return True


def keep_damaged(path: Path) -> Path:
    """Rename a damaged image, so that it can be generated again; returns the free name taken."""
    names = (f"damaged{count}_{path.name}" for count in chain([""], itertools.count(2)))
    kept = next(name for name in names if not path.with_name(name).exists())
    return path.rename(path.with_name(kept))


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


class OutputFolder:
    """--output_dir with the images of its gallery.

    clip_model is the folder of a CLIP model, by whose features the nearest training images are
    found, None for pixels. Raises UserError if the folder has an index.html that is not a gallery.
    """

    def __init__(self, path: Path, clip_model: str | None = None):
        self.path, self.clip_model = path, clip_model
        self.find_record = cache(records.find_record)
        listed = read_images(path)
        self.images = add_unlisted(path, images_on_disk(path, listed), self.find_record)
        if not listed and not self.images and (path / "index.html").exists():
            raise UserError(
                f"--output_dir {path} has an index.html of something else", "Name another folder"
            )


class GalleryWriter:
    """Adds the images of a run to an output folder. The page is complete after each save.

    first is the number of the run's first prompt; resumed says whether images of the run exist.

    Args:
        variants, jobs: what the run generates.
        resume: whether to look for a stopped run of the same jobs, and to add to its images.
        compare: whether each image has the base's image next to it.
    """

    def __init__(
        self,
        folder: OutputFolder,
        recorder: Recorder,
        variants: Sequence[LoraVariant],
        jobs: Sequence[Job],
        resume: bool,
        compare: bool,
    ):
        self._folder, self._images = folder.path, folder.images
        self._clip_model = folder.clip_model
        self._find_record = folder.find_record
        self._recorder, self._variants, self._jobs = recorder, variants, jobs
        self._compare = compare
        self._finders: dict[tuple[Path, ...], NearestImages] = {}
        self._near: list[str] = []  # files of images that are suspiciously near to a training image
        stopped = self._find_stopped() if resume else None
        self.resumed = stopped is not None
        self.first = first_free(folder.path) if stopped is None else stopped

    def _find_stopped(self) -> int | None:
        wanted = []
        for variant, job in product(self._variants, self._jobs):
            wanted.append((job.prompt_index, self._recorder.record(job, [job], variant)))
            if self._compare:
                record = self._recorder.record(job, [job], variant, without_lora=True)
                wanted.append((job.prompt_index, record))
        return first_of_stopped(self._folder, wanted, self._find_record)

    def pending(
        self, batches: Sequence[Sequence[Job]], is_wanted: Callable[[Job], bool]
    ) -> list[PendingBatch]:
        """The batches that lack a wanted image, variant by variant."""
        pending = []
        for variant, batch in product(self._variants, batches):
            wanted = [job for job in batch if is_wanted(job)]
            missing, missing_base = (
                [job for job in wanted if self._is_missing(job, variant, without_lora)]
                for without_lora in (False, True)
            )
            if missing or missing_base:
                pending.append(PendingBatch(variant, batch, missing, missing_base))
        if self.resumed:
            self._keep_damaged(pending)
        return pending

    def _is_missing(self, job: Job, variant: LoraVariant, without_lora: bool) -> bool:
        if without_lora and not self._compare:
            return False
        if not self.resumed:
            return True
        record = self._recorder.record(job, [job], variant, without_lora=without_lora)
        path = self._path(job, variant, without_lora)
        complete = is_complete(path, record, self._find_record)
        if complete:
            records.restore_thumbnail(path, record)
            if record.pixel_art and not without_lora:
                self._restore_pixel_art(path, record)
        return not complete

    def _keep_damaged(self, pending: Sequence[PendingBatch]) -> None:
        """Rename the damaged images among those to save; the gallery lists them no longer."""
        for item, without_lora in product(pending, (False, True)):
            for job in item.jobs_to_save(without_lora):
                path = self._path(job, item.variant, without_lora)
                if path.exists() and not png.is_whole(path):
                    kept = keep_damaged(path)
                    log.info(f"{path} is damaged: kept as {kept.name} and generated again")
        self._images = images_on_disk(self._folder, self._images)

    def _path(self, job: Job, variant: LoraVariant, without_lora: bool = False) -> Path:
        file = image_file(job, variant, self.first)
        return self._folder / (base_image_file(file) if without_lora else file)

    def summary(self, count: int, pending: Sequence[PendingBatch]) -> str:
        """What a resumed run finds of the images that it would generate, count in all."""
        if not self.resumed:
            return "resuming   nothing of this run is there"
        missing = sum(len({*item.missing, *item.missing_base}) for item in pending)
        return f"resuming   {count - missing} of {count} are there"

    def save_images(
        self,
        group: Sequence[PendingBatch],
        generated: Sequence[GeneratedImage],
        without_lora: bool,
    ) -> None:
        """Save the missing images of a group of batches with one variant, and list them; with
        without_lora, the base's images next to those of the same jobs.

        Raises UserError if another run took a name.
        """
        jobs = {job for item in group for job in item.jobs_to_save(without_lora)}
        for item in generated:
            if item.job not in jobs:
                continue
            path = self._path(item.job, group[0].variant, without_lora)
            refuse_taken(path)
            record = self._save(path, item, group[0].variant, without_lora)
            if not without_lora:
                base_file = base_image_file(path.name) if self._compare else None
                pixel_file = pixel_image_file(path.name) if record.pixel_art else None
                entry = records.gallery_image(path.name, record, base_file, pixel_file)
                nearest = self._find_nearest(path.name, item, group[0].variant)
                self._images.append(replace(entry, nearest=nearest))
        if without_lora and self.resumed:  # images of the stopped run may have lacked the base's
            self._images = images_on_disk(self._folder, self._images)

    def _save(
        self, path: Path, generated: GeneratedImage, variant: LoraVariant, without_lora: bool
    ) -> Record:
        record = self._recorder.record(
            generated.job, generated.batch, variant, generated.vae_tile, without_lora
        )
        self._folder.mkdir(parents=True, exist_ok=True)
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
            self._finders[paths] = _make_finder(paths, self._clip_model)
        nearest = self._finders[paths].find(self._folder, file, generated.image)
        if nearest is not None and nearest.is_near:
            self._near.append(file)
        return nearest

    def warnings(self) -> list[str]:
        """What the user should know about the images of this run."""
        if not self._near:
            return []
        return [
            f"nearer to a training image than nearly all of those are to each other: "
            f"{plural(len(self._near), 'image')}, such as {self._near[0]}; the LoRA may have "
            "memorized it"
        ]

    def _restore_pixel_art(self, path: Path, record: Record) -> None:
        """Save the pixel art of an image of the stopped run if it is missing or of another grid."""
        saved, pixel_path = self._find_record(path), path.with_name(pixel_image_file(path.name))
        if saved is None:
            return
        wanted = replace(saved, pixel_art=record.pixel_art, palette=record.palette)
        there = records.find_record(pixel_path) if pixel_path.is_file() else None
        if there == wanted and png.is_whole(pixel_path):
            return
        with Image.open(path, formats=["PNG"]) as image:
            save_pixel_art(path, wanted, image.convert("RGB"))
        self._images = images_on_disk(self._folder, self._images)

    def write_page(self) -> Path:
        """Write the gallery; returns the path of the page."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return write_gallery(self._folder, self._images, title_of(self._images))

    def write_grid(self) -> Path:
        """Write the comparison as one image: a column a variant, a row a job."""
        sheet = self._folder / f"grid_{self.first:03d}.png"
        files = [image.file for image in self._images]
        labels = dict(zip(files, variant_labels(self._images), strict=True))
        columns = [labels[self._path(self._jobs[0], each).name] for each in self._variants]
        rows = []
        for job in self._jobs:
            label = f"{self.first + job.prompt_index:03d}, seed {job.seed}\n{job.prompt}"
            rows.append((label, [self._path(job, each) for each in self._variants]))
        grid.save_grid(sheet, columns, rows)
        return sheet

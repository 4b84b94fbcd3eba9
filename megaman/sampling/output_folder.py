"""The output folder of a generation, and how a run adds its images and its page to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from megaman.errors import UserError, plural
from megaman.pages import grid
from megaman.pages.gallery import title_of, variant_labels, write_gallery
from megaman.pages.gallery_images import GalleryImage, read_images
from megaman.sampling import png, record_reader, records
from megaman.sampling.folder_images import (
    add_unlisted,
    first_free,
    first_of_stopped,
    images_on_disk,
    is_complete,
    keep_damaged,
)
from megaman.sampling.image_saver import ImageSaver, save_pixel_art
from megaman.sampling.jobs import (
    Job,
    LoraVariant,
    PendingBatch,
    pixel_image_file,
)

if TYPE_CHECKING:
    from megaman.sampling.records import Record, Recorder

log = logging.getLogger(__name__)


class OutputFolder:
    """--output_dir with the images of its gallery.

    clip_model is the folder of a CLIP model, by whose features the nearest training images are
    found, None for pixels. Raises UserError if the folder has an index.html that is not a gallery.
    """

    def __init__(self, path: Path, clip_model: str | None = None):
        self.path, self.clip_model = path, clip_model
        self.find_record = cache(record_reader.find_record)
        listed = read_images(path)
        self.images = add_unlisted(path, images_on_disk(path, listed), self.find_record)
        if not listed and not self.images and (path / "index.html").exists():
            raise UserError(
                f"--output_dir {path} has an index.html of something else", "Name another folder"
            )


class GalleryWriter:
    """Adds the images of a run to an output folder.

    saver saves them; it can be sent to other processes. resumed says whether images of the run
    exist.

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
        self._find_record = folder.find_record
        self._recorder, self._variants, self._jobs = recorder, variants, jobs
        self._compare = compare
        self._near: list[str] = []  # files of images that are suspiciously near to a training image
        stopped = self._find_stopped() if resume else None
        self.resumed = stopped is not None
        first = first_free(folder.path) if stopped is None else stopped
        self.saver = ImageSaver(folder.path, first, recorder, compare, folder.clip_model)
        places = enumerate(product(variants, jobs))
        self._order = {self.saver.path(job, each).name: place for place, (each, job) in places}

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
        path = self.saver.path(job, variant, without_lora)
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
                path = self.saver.path(job, item.variant, without_lora)
                if path.exists() and not png.is_whole(path):
                    kept = keep_damaged(path)
                    log.info(f"{path} is damaged: kept as {kept.name} and generated again")
        self._images = images_on_disk(self._folder, self._images)

    def summary(self, count: int, pending: Sequence[PendingBatch]) -> str:
        """What a resumed run finds of the images that it would generate, count in all."""
        if not self.resumed:
            return "resuming   nothing of this run is there"
        missing = sum(len({*item.missing, *item.missing_base}) for item in pending)
        return f"resuming   {count - missing} of {count} are there"

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
        there = record_reader.find_record(pixel_path) if pixel_path.is_file() else None
        if there == wanted and png.is_whole(pixel_path):
            return
        with Image.open(path, formats=["PNG"]) as image:
            save_pixel_art(path, wanted, image.convert("RGB"))
        self._images = images_on_disk(self._folder, self._images)

    def add(self, images: Sequence[GalleryImage]) -> Path:
        """List images that the saver has saved, those of this run by variant, prompt and number,
        and write the page; returns its path.

        Raises UserError if other processes have saved images that this one does not see.
        """
        listed = {image.file for image in self._images}
        added = [image for image in images if image.file not in listed]
        if unseen := [image.file for image in added if not (self._folder / image.file).exists()]:
            raise UserError(
                f"--output_dir {self._folder} lacks {unseen[0]}, which another machine has saved",
                "Name a folder on a disk that all machines share",
            )
        self._near += [image.file for image in added if image.nearest and image.nearest.is_near]
        self._images = self._in_order([*self._images, *added])
        if self._compare and self.resumed:  # images of the stopped run may have lacked the base's
            self._images = images_on_disk(self._folder, self._images)
        return self.write_page()

    def _in_order(self, images: Sequence[GalleryImage]) -> list[GalleryImage]:
        """The images with those of this run, which several processes and a stopped run may have
        saved, in the order in which one process generates them; the others stay in their places."""
        own = [image for image in images if image.file in self._order]
        own.sort(key=lambda image: self._order[image.file])
        following = iter(own)
        return [next(following) if image.file in self._order else image for image in images]

    def write_page(self) -> Path:
        """Write the gallery; returns the path of the page."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return write_gallery(self._folder, self._images, title_of(self._images))

    def write_grid(self) -> Path:
        """Write the comparison as one image: a column a variant, a row a job."""
        sheet = self._folder / f"grid_{self.saver.first:03d}.png"
        files = [image.file for image in self._images]
        labels = dict(zip(files, variant_labels(self._images), strict=True))
        columns = [labels[self.saver.path(self._jobs[0], each).name] for each in self._variants]
        rows = []
        for job in self._jobs:
            label = f"{self.saver.first + job.prompt_index:03d}, seed {job.seed}\n{job.prompt}"
            rows.append((label, [self.saver.path(job, each) for each in self._variants]))
        grid.save_grid(sheet, columns, rows)
        return sheet

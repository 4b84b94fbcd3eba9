"""The output folder of a generation: images of earlier runs, those of a stopped run, and the
images and the page that this run writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import UserError
from megaman.pages import grid
from megaman.pages.gallery import GalleryImage, read_images, variant_labels, write_gallery
from megaman.sampling import records
from megaman.sampling.jobs import Job, LoraVariant, PendingBatch, base_image_file, image_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from megaman.sampling.generator import GeneratedImage
    from megaman.sampling.records import Record, Recorder

NUMBERED = re.compile(r"megaman_(\d+)_\d+.*\.png")
TITLE = "Mega Man LoRA"


def add_unlisted(folder: Path, images: list[GalleryImage]) -> list[GalleryImage]:
    """The gallery's images, and those that a killed run saved before the page listed them."""
    listed = {file for image in images for file in (image.file, image.base_file)}
    unlisted = []
    for path in sorted(folder.glob("megaman_*.png")):
        if path.name in listed or path.name.endswith("_base.png"):
            continue
        if record := records.find_record(path):
            base = path.with_name(base_image_file(path.name))
            base_file = base.name if base.is_file() else None
            unlisted.append(records.gallery_image(path.name, record, base_file))
    return [*images, *unlisted]


def first_free(folder: Path) -> int:
    """The first prompt number after those of all images in the folder."""
    names = [path.name for path in folder.glob("megaman_*.png")]
    matches = filter(None, map(NUMBERED.fullmatch, names))
    return max((int(match[1]) for match in matches), default=-1) + 1


def first_of_stopped(folder: Path, wanted: Sequence[tuple[int, Record]]) -> int | None:
    """The number of the first prompt in the run that was stopped, or None if there is no image
    of it.

    wanted are the prompt indices with the records that their images would have. Each image that
    fits votes for the number that its own number and index imply.
    """
    indices: dict[tuple, list[int]] = {}
    for prompt_index, record in wanted:
        indices.setdefault(record.identity, []).append(prompt_index)
    votes: Counter[int] = Counter()
    for path in folder.glob("megaman_*.png"):
        match = NUMBERED.fullmatch(path.name)
        if match is None or path.name.endswith("_base.png"):
            continue
        if record := records.find_record(path):
            number = int(match[1])
            fitting = indices.get(record.identity, [])
            votes.update({number - index for index in fitting if index <= number})
    return max(votes, key=lambda first: (votes[first], first)) if votes else None


def is_complete(path: Path, record: Record) -> bool:
    """Whether the image exists already; raises UserError if another one has its name."""
    if not path.exists():
        return False
    found = records.find_record(path)
    if found is None or found.identity != record.identity:
        raise UserError(
            f"--resume: {path} is not an image that this command generates",
            "Use the flags of the stopped run, or omit --resume",
        )
    return True


def refuse_taken(path: Path) -> None:
    """Raise UserError if an image has this name by now: it was free when the run began."""
    if path.exists():
        raise UserError(
            f"{path} was written by another run in the meantime",
            "Give each run its own --output_dir",
        )


class OutputFolder:
    """--output_dir with the images of its gallery.

    Raises UserError if the folder has an index.html that is not a gallery.
    """

    def __init__(self, path: Path):
        self.path = path
        self.images = add_unlisted(path, read_images(path))
        if not self.images and (path / "index.html").exists():
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
        self._recorder, self._variants, self._jobs = recorder, variants, jobs
        self._compare = compare
        stopped = self._find_stopped() if resume else None
        self.resumed = stopped is not None
        self.first = first_free(folder.path) if stopped is None else stopped

    def _find_stopped(self) -> int | None:
        wanted = []
        for variant, job in product(self._variants, self._jobs):
            wanted.append((job.prompt_index, self._recorder.record(job, [job], variant)))
        return first_of_stopped(self._folder, wanted)

    def pending(
        self, batches: Sequence[Sequence[Job]], is_wanted: Callable[[Job], bool]
    ) -> list[PendingBatch]:
        """The batches that lack a wanted image, variant by variant."""
        pending = []
        for variant, batch in product(self._variants, batches):
            missing = [job for job in batch if is_wanted(job) and self._is_missing(job, variant)]
            if missing:
                pending.append(PendingBatch(variant, batch, missing))
        self._forget_missing(pending)
        return pending

    def _is_missing(self, job: Job, variant: LoraVariant) -> bool:
        if not self.resumed:
            return True
        record = self._recorder.record(job, [job], variant)
        return not is_complete(self._path(job, variant), record)

    def _forget_missing(self, pending: Sequence[PendingBatch]) -> None:
        """Remove images from the gallery that it lists although their files were deleted."""
        files = set()
        for item in pending:
            files.update(self._path(job, item.variant).name for job in item.missing)
        self._images = [image for image in self._images if image.file not in files]

    def _path(self, job: Job, variant: LoraVariant) -> Path:
        return self._folder / image_file(job, variant, self.first)

    def summary(self, count: int, pending: Sequence[PendingBatch]) -> str:
        """What a resumed run finds of the images that it would generate, count in all."""
        if not self.resumed:
            return "resuming   nothing of this run is there"
        missing = sum(len(item.missing) for item in pending)
        return f"resuming   {count - missing} of {count} are there"

    def save_base_images(
        self, group: Sequence[PendingBatch], generated: Sequence[GeneratedImage]
    ) -> None:
        """Save the images without LoRA next to those of the same jobs."""
        for item in _missing(group, generated):
            path = self._path(item.job, group[0].variant)
            path = path.with_name(base_image_file(path.name))
            if not self.resumed:
                refuse_taken(path)
            self._save(path, item, group[0].variant, without_lora=True)

    def save_images(
        self, group: Sequence[PendingBatch], generated: Sequence[GeneratedImage]
    ) -> None:
        """Save the missing images of a group of batches with one variant, and list them.

        Raises UserError if another run took a name.
        """
        for item in _missing(group, generated):
            path = self._path(item.job, group[0].variant)
            refuse_taken(path)
            record = self._save(path, item, group[0].variant, without_lora=False)
            base_file = base_image_file(path.name) if self._compare else None
            self._images.append(records.gallery_image(path.name, record, base_file))

    def _save(
        self, path: Path, generated: GeneratedImage, variant: LoraVariant, without_lora: bool
    ) -> Record:
        record = self._recorder.record(
            generated.job, generated.batch, variant, generated.vae_tiling, without_lora
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        records.save(path, generated.image, record)
        return record

    def write_page(self) -> Path:
        """Write the gallery; returns the path of the page."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return write_gallery(self._folder, self._images, TITLE)

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


def _missing(
    group: Sequence[PendingBatch], generated: Sequence[GeneratedImage]
) -> list[GeneratedImage]:
    jobs = {job for item in group for job in item.missing}
    return [item for item in generated if item.job in jobs]

"""The images of a run: found, checked and captioned before torch is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.data.buckets import make_buckets
from megaman.data.crops import Rendering
from megaman.data.dataset import MegaManDataset
from megaman.data.file_index import FileIndex
from megaman.data.folders import FolderConfig
from megaman.data.problems import check_usable, write_instructions, write_problems
from megaman.errors import UserError
from megaman.sequences import spread

if TYPE_CHECKING:
    from megaman.config.image_settings import BucketConfig, CaptionConfig
    from megaman.config.settings import TrainConfig

MAX_EVALUATED = 32  # held-out images; more would cost more than they say

log = logging.getLogger(__name__)


@dataclass
class Datasets:
    """The images to learn, class images if there are any, and the index of their files; load reads
    the folder of the images again, load_held_out that of held-out images.

    held_out has the images that are never trained on, None if there are none. evaluated has those
    whose loss is computed, MAX_EVALUATED at most, and as many of the images to learn; it is empty
    if nothing is held out.
    """

    images: MegaManDataset
    class_images: MegaManDataset | None
    file_index: FileIndex
    load: Callable[[], MegaManDataset]
    load_held_out: Callable[[], MegaManDataset] | None = None
    held_out: MegaManDataset | None = None
    evaluated: tuple[MegaManDataset, ...] = ()

    @property
    def all(self) -> list[MegaManDataset]:
        """The images first."""
        return [self.images] if self.class_images is None else [self.images, self.class_images]

    @property
    def captions(self) -> list[str]:
        """The captions of all images."""
        captions: list[str] = []
        for dataset in self.all:
            captions += dataset.captions
        return captions

    @property
    def evaluated_captions(self) -> list[str]:
        """The captions of the images that are evaluated."""
        captions: list[str] = []
        for dataset in self.evaluated:
            captions += dataset.captions
        return captions

    def hold_out(self, names: Collection[str]) -> None:
        """Hold these images out, by their names in their folder (`MegaManDataset.name`)."""
        if self.load_held_out is None:
            self.held_out = self.images.take_out(names)
        else:
            everything = self.load_held_out()
            self.held_out = everything.take_out(names)
        num_evaluated = min(len(self.held_out), MAX_EVALUATED)
        self.evaluated = tuple(
            dataset.select(spread(range(len(dataset)), num_evaluated))
            for dataset in (self.held_out, self.images)
        )

    def write_captions(self, model: str, progress_bar: Callable[..., Iterable[Any]]) -> None:
        """Have a model write captions next to the images that have none; reload() reads them."""
        _write_captions(model, self.images, progress_bar)
        if self.held_out is not None:
            _write_captions(model, self.held_out, progress_bar)

    def reload(self) -> None:
        """Read the folders of the images again."""
        self.images = self.load()
        if self.held_out is not None:
            self.hold_out(self.held_out_names)

    @property
    def held_out_names(self) -> list[str]:
        """The names of the held-out images in their folder."""
        held_out = self.held_out
        return [] if held_out is None else [held_out.name(i) for i in range(len(held_out))]

    def add_affixes(self, config: CaptionConfig) -> None:
        """Add trigger word, prefix and suffix to the captions of all but the class images."""
        affixes = config.trigger_word, config.caption_prefix, config.caption_suffix
        self.images.add_affixes(*affixes)
        if self.held_out is not None:
            self.held_out.add_affixes(*affixes)

    def set_buckets(self, native_size: int, config: BucketConfig) -> None:
        """Sort all images into buckets; native_size is the side of the base's images in pixels."""
        limits = config.limits(self.images.size)
        for dataset in [*self.all, *self.evaluated]:
            dataset.set_buckets(make_buckets(native=native_size, **limits))

    def check(self, output_dir: Path, skip_bad: bool) -> None:
        """Raise UserError if too few images can be used, and report the others then."""
        try:
            check_usable(self.all, skip_bad)
        except UserError:
            self.report_problems(output_dir)
            raise

    def report_problems(self, output_dir: Path) -> None:
        """Log every skipped file and every doubtful caption, and write them to a file."""
        for line in write_problems(output_dir / "dataset_problems.json", self.all):
            log.info(line)


def find_datasets(config: TrainConfig) -> Datasets | None:
    """Read the folders and check the images' headers.

    Returns None, after instructions, if the default folder has no images yet. Raises UserError if a
    folder that was named is missing or empty.
    """
    data, file_index = config.data, FileIndex(config.cache.path())

    def load(folder: str, repeats: int, flag: str) -> MegaManDataset:
        folder_config = FolderConfig(config.captions.caption_extension, repeats, flag)
        rendering = Rendering(data.upscale, data.background, data.alpha_mask)
        dataset = MegaManDataset(
            folder, None, data.resolution, data.center_crop, folder_config, rendering
        )
        dataset.check(file_index)
        return dataset

    def load_images() -> MegaManDataset:
        return load(data.data_dir, data.dataset_repeats, "--data_dir")

    is_explicit = config.run.demo or "data_dir" in config.explicit
    folder = Path(data.data_dir)
    if not is_explicit and not folder.is_dir():
        folder.mkdir(parents=True)
    images = load_images()
    if _is_empty(images) and not is_explicit:
        _explain(data.data_dir)
        return None
    _refuse_empty(images)
    class_images = None
    if data.class_data_dir:
        class_images = load(data.class_data_dir, 1, "--class_data_dir")
        _refuse_empty(class_images)
    load_held_out = None
    if held_out_dir := config.evaluation.validation_data_dir:
        load_held_out = partial(load, held_out_dir, 1, "--validation_data_dir")
    return Datasets(images, class_images, file_index, load_images, load_held_out)


def _write_captions(
    model: str, dataset: MegaManDataset, progress_bar: Callable[..., Iterable[Any]]
) -> None:
    from megaman.data import captioner  # loads torch

    captioner.caption_missing(model, dataset, progress_bar)


def _is_empty(dataset: MegaManDataset) -> bool:
    return not len(dataset) and not dataset.skipped


def _refuse_empty(dataset: MegaManDataset) -> None:
    if _is_empty(dataset):
        check_usable([dataset], skip_bad=False)


def _explain(data_dir: str) -> None:
    log.info(
        "There are no images yet. Put 20 to 100 of them into %s and run the same command again.",
        data_dir,
    )
    log.info(
        "How, with captions: %s. To see a whole run first: python megaman_lora.py --demo",
        write_instructions(Path(data_dir)),
    )

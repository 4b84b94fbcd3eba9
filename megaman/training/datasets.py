"""The images of a run: found, checked and captioned before torch is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.data.buckets import make_buckets
from megaman.data.crops import Rendering
from megaman.data.dataset import MegaManDataset
from megaman.data.file_index import FileIndex
from megaman.data.folders import FolderConfig
from megaman.data.problems import check_usable, write_instructions, write_problems
from megaman.errors import UserError

if TYPE_CHECKING:
    from megaman.config.image_settings import BucketConfig, CaptionConfig
    from megaman.config.settings import TrainConfig

log = logging.getLogger(__name__)


@dataclass
class Datasets:
    """The images to learn, class images if there are any, and the index of their files; load reads
    the folder of the images again."""

    images: MegaManDataset
    class_images: MegaManDataset | None
    file_index: FileIndex
    load: Callable[[], MegaManDataset]

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

    def write_captions(self, model: str, progress_bar: Callable[..., Iterable[Any]]) -> None:
        """Have a model write captions next to the images that have none; reload() reads them."""
        _write_captions(model, self.images, progress_bar)

    def reload(self) -> None:
        """Read the folder of the images again."""
        self.images = self.load()

    def add_affixes(self, config: CaptionConfig) -> None:
        """Add trigger word, prefix and suffix to the captions of the images to learn."""
        self.images.add_affixes(config.trigger_word, config.caption_prefix, config.caption_suffix)

    def set_buckets(self, native_size: int, config: BucketConfig) -> None:
        """Sort all images into buckets; native_size is the side of the base's images in pixels."""
        limits = config.limits(self.images.size)
        for dataset in self.all:
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
    return Datasets(images, class_images, file_index, load_images)


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

"""MegaManDataset: a folder of images and captions as training examples."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.data.buckets import Buckets, Size
from megaman.data.captions import add_affixes, names_a_side
from megaman.data.crops import LANCZOS, Crop, Rendering, make_boxes, render_crops, render_small
from megaman.data.file_index import FileIndex
from megaman.data.folders import Example, FolderConfig, read_layout
from megaman.data.image_info import read_info
from megaman.data.images import (
    BadImageError,
    Box,
    ImageInfo,
    image_size,
    open_transparent,
)
from megaman.errors import UserError
from megaman.files import digest_of, stamp_of

if TYPE_CHECKING:  # torch is imported when an item is read: counting a folder must not wait for it
    import torch
    from PIL import Image
    from transformers import CLIPTokenizer

DEFAULT_CONFIG = FolderConfig()
DEFAULT_RENDERING = Rendering()


class MegaManDataset:
    """A map-style dataset of the images in data_dir and its subfolders, in natural order.

    Items are squares, or have the size of their image's bucket if there are buckets.

    Args:
        data_dir: the folder.
        tokenizer: a CLIPTokenizer, or None for captions as text.
        size: side of the square items in pixels.
        center_crop: cut out the middle square; otherwise a random one every time.
        config: how to read the folder.
        rendering: how to enlarge images and what is behind transparent ones.

    An item is a dict with "pixel_values", float32 [3, size, size] in -1 ... 1, and "input_ids",
    int64 [tokenizer.model_max_length] (or "caption", a str, without a tokenizer). Reading a damaged
    image raises BadImageError. The constructor raises UserError if data_dir is not a folder.

    examples has the images with all that is known about them. skipped has every file that is not
    used, with the reason, and sorted_out those of them that the folder's layout excludes on
    purpose; metadata_warnings has what could not be used of metadata files, unread_metadata what is
    wrong with those on which images depend that have no other caption.
    """

    def __init__(
        self,
        data_dir: str | Path,
        tokenizer: CLIPTokenizer | None,
        size: int = 512,
        center_crop: bool = True,
        config: FolderConfig = DEFAULT_CONFIG,
        rendering: Rendering = DEFAULT_RENDERING,
    ):
        self.data_dir = Path(data_dir)
        if not self.data_dir.is_dir():
            remedy = f"Name the folder with your images in {config.flag}"
            raise UserError(f"{data_dir} is not a folder", remedy)
        self.config, self.rendering = config, rendering
        # The part of every image's path that is the folder's: Path.relative_to is slow with
        # 100,000 images.
        parts = self.data_dir.parts
        self._prefix_length = len(self.data_dir.as_posix().rstrip("/")) + 1 if parts else 0
        self.tokenizer = tokenizer
        self.size = size
        self.center_crop = center_crop
        self.buckets: Buckets | None = None
        layout = read_layout(self.data_dir, config)
        self.examples: list[Example] = layout.examples
        self.skipped: dict[Path, str] = layout.skipped
        self.sorted_out: dict[Path, str] = layout.sorted_out
        self.metadata_warnings: list[tuple[Path, str]] = layout.metadata_warnings
        self.unread_metadata: dict[Path, str] = layout.unread_metadata

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        crops = self.get_crops(index, 1, False, seed=str(random.Random().random()))
        item: dict[str, Any] = {"pixel_values": self.load_crops(index, crops)[0]}
        if self.tokenizer is None:
            item["caption"] = example.caption
        else:
            item["input_ids"] = self.tokenizer(
                example.caption, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids[0]
        return item

    @property
    def captions(self) -> list[str]:
        """The captions in order, as a new list."""
        return [example.caption for example in self.examples]

    @property
    def num_written_captions(self) -> int:
        """How many captions somebody wrote; the others are made from names."""
        return len([example for example in self.examples if example.caption_from_file])

    def check(self, file_index: FileIndex | None = None) -> None:
        """Read the images' headers and drop those that are damaged or have a useless size; decode
        those that have to be enlarged, to find pixel art, if that matters.

        A file that is unchanged since it was added to the file index is not opened.
        """
        reasons: dict[Path, str] = {}
        for example in self.examples:
            try:
                example.info = self._read_info(example.image, file_index)
            except BadImageError as error:
                reasons[example.image] = str(error)
        self.drop(reasons)

    def hash_files(self, file_index: FileIndex) -> list[bytes]:
        """The digest of every image's bytes, in order.

        Files with an unknown digest are read and added to the file index; images that cannot be
        read are dropped.
        """
        reasons: dict[Path, str] = {}
        digests, entries = [], []
        for example in self.examples:
            path = example.image
            try:
                info = example.info or self._read_info(path, file_index)
                digest = info.digest
                if digest is None:
                    stamp, digest = stamp_of(path), digest_of(path)
                    entries.append((path, stamp, f"{digest.hex()} {info.width} {info.height}"))
                    info = info._replace(digest=digest)
            except BadImageError as error:
                reasons[path] = str(error)
            except OSError as error:
                reasons[path] = f"cannot be read ({error.strerror})"
            else:
                example.info = info
                digests.append(digest)
        file_index.update(entries)
        self.drop(reasons)
        return digests

    def add_affixes(self, trigger: str = "", prefix: str = "", suffix: str = "") -> None:
        """Add prefix, suffix and trigger words to every caption (`captions.add_affixes`)."""
        for example in self.examples:
            example.caption = add_affixes(example.caption, trigger, prefix, suffix)

    def set_buckets(self, buckets: Buckets) -> None:
        """Give each item the size of its image's bucket from now on."""
        self.buckets = buckets

    def set_truncated(self, truncated: Sequence[str]) -> None:
        """Store for each caption the end that the text encoder does not read, "" if it reads all
        (`text_encoding.truncated_text`)."""
        for example, rest in zip(self.examples, truncated, strict=True):
            example.truncated = rest

    def drop(self, reasons: Mapping[Path, str]) -> None:
        """Skip these images for the given reasons."""
        if reasons:
            self.skipped |= reasons
            self.examples = [example for example in self.examples if example.image not in reasons]

    def take_out(self, names: Collection[str]) -> MegaManDataset:
        """Move the images with these names (`name`) into a dataset of their own."""
        indices = [index for index in range(len(self)) if self.name(index) in names]
        taken = self.select(indices)
        self.examples = [
            example for index, example in enumerate(self.examples) if index not in set(indices)
        ]
        return taken

    def select(self, indices: Sequence[int]) -> MegaManDataset:
        """A dataset of some of the images, in this order, whose items are cropped in the middle.

        It shares the examples with this one, and nothing is skipped in it yet.
        """
        selected = copy.copy(self)
        selected.examples = [self.examples[index] for index in indices]
        selected.center_crop = True
        selected.skipped, selected.sorted_out, selected.unread_metadata = {}, {}, {}
        selected.metadata_warnings = []
        return selected

    def epoch_indices(self) -> list[int]:
        """The indices of the images that make up an epoch: each as often as it is repeated."""
        indices = []
        for index, example in enumerate(self.examples):
            indices += [index] * example.repeats
        return indices

    def by_folder(self) -> dict[str, tuple[int, list[str]]]:
        """Repeats and captions of each of kohya's folders 10_name, and of all other images under
        the name of data_dir."""
        folders = {example.folder for example in self.examples}
        names = {folder: folder.relative_to(self.data_dir).as_posix() for folder in folders}
        names[self.data_dir] = self.data_dir.resolve().name
        groups: dict[str, tuple[int, list[str]]] = {}
        for example in self.examples:
            group = groups.setdefault(names[example.folder], (example.repeats, []))
            group[1].append(example.caption)
        return groups

    def can_flip(self, index: int) -> bool:
        """Whether the image may be mirrored: not if its caption says left or right."""
        return not names_a_side(self.examples[index].caption)

    def name(self, index: int) -> str:
        """An image's path within data_dir, with forward slashes."""
        return self.examples[index].image.as_posix()[self._prefix_length :]

    def pixel_art(self) -> list[str]:
        """The names of the images that are enlarged like pixel art."""
        if self.rendering.upscale == LANCZOS:
            return []
        enlarged = []
        for index, example in enumerate(self.examples):
            has_cell = example.info is None or example.info.cell > 0
            if has_cell and self.get_crops(index, 1, False, 0)[0].cell:
                enlarged.append(self.name(index))
        return enlarged

    def get_crops(self, index: int, num_crops: int, flip: bool, seed: int | str) -> list[Crop]:
        """All crops on which an image is trained: the middle one, or up to num_crops random ones
        that depend on the seed; with flip also the mirror image of each, if `can_flip`.

        Reads the image's header at most.
        """
        width, height, cell = self._size_and_cell(index)
        size = self._target_size(width, height)
        rng = None
        if not self.center_crop:
            # A name on Linux need not be Unicode.
            rng = random.Random(f"{seed} {self.name(index)}".encode("utf-8", "surrogatepass"))
        boxes, cell = make_boxes(width, height, num_crops, rng, size, cell)
        crops = [Crop(box, size, False, cell) for box in boxes]
        if flip and self.can_flip(index):
            crops += [Crop(box, size, True, cell) for box in boxes]
        return crops

    def _size_and_cell(self, index: int) -> tuple[int, int, int]:
        """An image's width and height in pixels, and its cell if it is enlarged like pixel art."""
        example = self.examples[index]
        if example.info is None and self.rendering.upscale == LANCZOS:
            return *image_size(example.image), 0
        info = example.info or self._read_info(example.image, None)
        return info.width, info.height, info.cell

    def _read_info(self, image: Path, file_index: FileIndex | None) -> ImageInfo:
        return read_info(image, file_index, self.rendering.upscale, self.size)

    def load_crops(self, index: int, crops: Sequence[Crop]) -> list[torch.Tensor]:
        """The pixels of these crops of an image, as `crops.render_crops` returns them.

        Raises BadImageError if the image cannot be decoded.
        """
        longest = max(max(crop.size) for crop in crops)
        image = open_transparent(self.examples[index].image, side_if_large=longest)
        crops = [crop._replace(box=self._box_in(image.size, index, crop.box)) for crop in crops]
        return render_crops(image, crops, self.rendering)

    def load_small_crops(self, index: int, crops: Sequence[Crop], side: int) -> list[Image.Image]:
        """These crops of an image, upright and squeezed into squares of so many pixels.

        A large JPEG is decoded at a fraction of its size. Raises BadImageError if the image cannot
        be decoded.
        """
        image = open_transparent(self.examples[index].image, min_side=2 * side)
        crops = [crop._replace(box=self._box_in(image.size, index, crop.box)) for crop in crops]
        return [render_small(image, crop, self.rendering, side) for crop in crops]

    def _box_in(self, decoded: Size, index: int, box: Box) -> tuple[float, float, float, float]:
        """The box in the decoded image, which may be smaller than the header says."""
        if box[2] <= decoded[0] and box[3] <= decoded[1]:
            return box
        info = self.examples[index].info
        width, height = info.size if info else image_size(self.examples[index].image)
        x, y = decoded[0] / width, decoded[1] / height
        right, bottom = min(box[2] * x, decoded[0]), min(box[3] * y, decoded[1])
        return box[0] * x, box[1] * y, right, bottom

    def _target_size(self, width: int, height: int) -> Size:
        return self.buckets.size_for(width, height) if self.buckets else (self.size, self.size)

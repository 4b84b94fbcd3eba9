"""MegaManDataset: a folder of pictures and captions as training items."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.buckets import Buckets, Size
from megaman.captions import dressed, tells_a_side
from megaman.errors import UserError
from megaman.images import BadImageError, Box, crop_boxes, fit, image_size, open_image
from megaman.layouts import describe, read_layout

if TYPE_CHECKING:  # torch is imported where an item is read: counting a folder must not wait for it
    import torch
    from PIL import Image
    from transformers import CLIPTokenizer


class MegaManDataset:
    """A map-style dataset of the pictures in data_dir and its subfolders, in natural order.

    Items are squares; where buckets is set, each has the size of its picture's bucket.

    Args:
        data_dir: the folder.
        tokenizer: a CLIPTokenizer, or None for captions as text.
        size: side of the square items in pixels.
        center_crop: cut out the middle square; otherwise a random one at every reading.
        caption_extension: of the files beside the pictures that hold their captions; None for .txt, then .caption.
        repeats: how often every picture counts in an epoch, times the number of its folder where that is kohya's
            10_name.
        flag: of the command line that named the folder, for what is said about it.

    An item is a dict with "pixel_values", float32 [3, size, size] in -1 ... 1, and "input_ids", int64
    [tokenizer.model_max_length] (or "caption", a str, without a tokenizer). Reading a damaged picture raises
    BadImageError.

    problems has every file that was left out, with the reason; remarks has, for each picture, the path of its caption
    file and what a person should know about it, or None; notes has the like about files with many captions. found says
    whether a caption was written or made from a name, sources in words where it comes from. repeats has how often each
    picture is seen in an epoch.
    """

    def __init__(
        self,
        data_dir: str | Path,
        tokenizer: CLIPTokenizer | None,
        size: int = 512,
        center_crop: bool = True,
        caption_extension: str | None = None,
        repeats: int = 1,
        flag: str = "--data_dir",
    ):
        self.data_dir = Path(data_dir)
        if not self.data_dir.is_dir():
            raise UserError(f"{data_dir} is not a folder", f"Name the folder with your pictures in {flag}")
        self.flag = flag
        self.tokenizer = tokenizer
        self.size = size
        self.center_crop = center_crop
        self.caption_extension = caption_extension
        self.buckets: Buckets | None = None
        entries, self.problems, self.notes = read_layout(self.data_dir, caption_extension, repeats)
        self.pictures = [entry.picture for entry in entries]
        self.captions = [entry.caption.text for entry in entries]
        self.found = [entry.caption.found for entry in entries]
        self.remarks = [entry.caption.remark for entry in entries]
        self.sources = [entry.source for entry in entries]
        self.repeats = [entry.repeats for entry in entries]
        self.cut = [""] * len(entries)  # of each caption what falls away, once a tokenizer has been asked
        self.folders = [entry.folder for entry in entries]  # the one that the repeats come from

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = open_image(self.pictures[index])
        rng = None if self.center_crop else random.Random()
        size = self._size_for(image)
        box = crop_boxes(*image.size, count=1, rng=rng, shape=size)[0]
        item: dict[str, Any] = {"pixel_values": pixel_values(fit(image, box, size))}
        if self.tokenizer is None:
            item["caption"] = self.captions[index]
        else:
            item["input_ids"] = self.tokenizer(
                self.captions[index], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids[0]
        return item

    def check(self) -> None:
        """Drop the pictures whose header cannot be read, or tells of a size that is of no use."""
        problems = {}
        for picture in self.pictures:
            try:
                image_size(picture)
            except BadImageError as error:
                problems[picture] = str(error)
        self.drop(problems)

    def dress(self, trigger: str = "", prefix: str = "", suffix: str = "") -> None:
        """Put prefix, suffix and trigger words to every caption (captions.dressed)."""
        self.captions = [dressed(caption, trigger, prefix, suffix) for caption in self.captions]

    def fingerprint(self) -> str:
        """Count and digest of the pictures' names, sizes in bytes, captions and repeats, for a resumed run."""
        digest = hashlib.sha256()
        for picture, caption, repeats in zip(self.pictures, self.captions, self.repeats, strict=True):
            name = picture.relative_to(self.data_dir).as_posix()
            often = f"x {repeats}\n" if repeats != 1 else ""
            digest.update(f"{name}\n{picture.stat().st_size}\n{caption}\n{often}".encode("utf-8", "surrogatepass"))
        return f"{len(self)} pictures ({digest.hexdigest()[:8]})"

    def drop(self, problems: dict[Path, str]) -> None:
        """Leave these pictures out, for the reasons given."""
        self.problems |= problems
        kept = [i for i, picture in enumerate(self.pictures) if picture not in problems]
        for name in ("pictures", "captions", "found", "remarks", "sources", "repeats", "folders", "cut"):
            setattr(self, name, [getattr(self, name)[i] for i in kept])

    def epoch(self) -> list[int]:
        """The pictures' numbers as one epoch has them: each as often as it is repeated."""
        return [index for index, count in enumerate(self.repeats) for _ in range(count)]

    def by_folder(self) -> dict[str, tuple[int, list[str]]]:
        """Repeats and captions of each folder that has its own number (kohya's 10_name), and of all others together
        under the name of data_dir."""
        groups: dict[str, tuple[int, list[str]]] = {}
        for folder, repeats, caption in zip(self.folders, self.repeats, self.captions, strict=True):
            own = folder != self.data_dir
            name = folder.relative_to(self.data_dir).as_posix() if own else self.data_dir.resolve().name
            groups.setdefault(name, (repeats, []))[1].append(caption)
        return groups

    def describe(self, crops: int, flip: bool) -> list[str]:
        """What was found and how it is read, in about three lines; crops counts those of all the pictures."""
        folders = len({picture.parent for picture in self.pictures})
        place = f"{f'{folders} folders of ' if folders > 1 else ''}{self.data_dir}"
        lines = [f"pictures   {len(self)} in {place}, {crops} crops{' with their mirror images' * flip}"]
        if flip and (sided := sum(map(self.keeps_sides, range(len(self))))):
            lines.append(f"           not mirrored: {sided}, whose captions say left or right")
        lines.append(f"captions   {describe(self.sources)}")
        repeated = [f"{name} x {count}" for name, (count, _) in self.by_folder().items() if count > 1]
        if repeated:
            more = f" and {len(repeated) - 8} more" if len(repeated) > 8 else ""
            lines.append(f"repeats    {', '.join(repeated[:8])}{more}: {sum(self.repeats)} pictures an epoch")
        return lines

    def keeps_sides(self, index: int) -> bool:
        """Whether the picture must not be mirrored, because its caption would be wrong then."""
        return tells_a_side(self.captions[index])

    def variants(self, index: int, crops: int, flip: bool, seed: int) -> list[torch.Tensor]:
        """Every form in which a picture is trained on: its crops (one in the middle, or drawn from the seed), and with
        flip the mirror image of each, unless it keeps its sides; a list of float32 [3, H, W] of one size."""
        image = open_image(self.pictures[index])
        name = self.pictures[index].relative_to(self.data_dir).as_posix()
        own = f"{seed} {name}".encode("utf-8", "surrogatepass")  # a name on Linux need not be Unicode
        rng = None if self.center_crop else random.Random(own)
        size = self._size_for(image)
        boxes: list[Box] = crop_boxes(*image.size, count=crops, rng=rng, shape=size)
        upright = [pixel_values(fit(image, box, size)) for box in boxes]
        mirrored = flip and not self.keeps_sides(index)
        return upright + ([picture.flip(-1) for picture in upright] if mirrored else [])

    def _size_for(self, image: Image.Image) -> Size:
        return self.buckets.size_for(*image.size) if self.buckets else (self.size, self.size)


def pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 [3, H, W] in -1 ... 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1

"""MegaManDataset: a folder of pictures and captions as training items."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megaman.data.buckets import Buckets, Size
from megaman.data.captions import dressed, tells_a_side
from megaman.data.file_index import Stamps
from megaman.data.folders import describe, read_layout
from megaman.data.images import BadImageError, Box, crop_boxes, fit, image_size, open_image
from megaman.errors import UserError
from megaman.files import digest_of, stamp_of

if TYPE_CHECKING:  # torch is imported where an item is read: counting a folder must not wait for it
    import torch
    from PIL import Image
    from transformers import CLIPTokenizer


class Look(NamedTuple):
    """What is known of a picture without decoding it: width and height as it will be seen, its
    file's size in bytes, and a digest of its bytes, once these were read."""

    size: Size
    bytes: int
    digest: bytes | None = None


class Form(NamedTuple):
    """One way in which a picture is trained on: cut out box, bring it to size, mirror it."""

    box: Box
    size: Size
    mirrored: bool


class MegaManDataset:
    """A map-style dataset of the pictures in data_dir and its subfolders, in natural order.

    Items are squares; where buckets is set, each has the size of its picture's bucket.

    Args:
        data_dir: the folder.
        tokenizer: a CLIPTokenizer, or None for captions as text.
        size: side of the square items in pixels.
        center_crop: cut out the middle square; otherwise a random one at every reading.
        caption_extension: of the files beside the pictures that hold their captions; None for .txt,
            then .caption.
        repeats: how often every picture counts in an epoch, times the number of its folder where
            that is kohya's 10_name.
        flag: of the command line that named the folder, for what is said about it.

    An item is a dict with "pixel_values", float32 [3, size, size] in -1 ... 1, and "input_ids",
    int64 [tokenizer.model_max_length] (or "caption", a str, without a tokenizer). Reading a damaged
    picture raises BadImageError.

    problems has every file that was left out, with the reason; remarks has, for each picture, the
    path of its caption file and what a person should know about it, or None; notes has the like
    about files with many captions. found says whether a caption was written or made from a name,
    sources in words where it comes from. repeats has how often each picture is seen in an epoch.
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
            raise UserError(
                f"{data_dir} is not a folder", f"Name the folder with your pictures in {flag}"
            )
        self.flag = flag
        # The part of every picture's path that is the folder's; Path.relative_to takes long with
        # 100,000 pictures.
        self._above = len(self.data_dir.as_posix().rstrip("/")) + 1 if self.data_dir.parts else 0
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
        self.cut = [""] * len(
            entries
        )  # of each caption what falls away, once a tokenizer has been asked
        self.folders = [entry.folder for entry in entries]  # the one that the repeats come from
        self.looks: list[Look | None] = [None] * len(entries)  # once they were looked at

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = open_image(self.pictures[index])
        rng = None if self.center_crop else random.Random()
        size = self._size_for(*image.size)
        box = crop_boxes(*image.size, count=1, rng=rng, shape=size)[0]
        item: dict[str, Any] = {"pixel_values": pixel_values(fit(image, box, size))}
        if self.tokenizer is None:
            item["caption"] = self.captions[index]
        else:
            item["input_ids"] = self.tokenizer(
                self.captions[index], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids[0]
        return item

    def check(self, seen: Stamps | None = None) -> None:
        """Drop the pictures whose header cannot be read, or tells of a size that is of no use.

        A file that is as it was when seen noted it is not opened.
        """
        problems = {}
        for index, picture in enumerate(self.pictures):
            try:
                self.looks[index] = _look(picture, seen)
            except BadImageError as error:
                problems[picture] = str(error)
        self.drop(problems)

    def recognise(self, seen: Stamps) -> None:
        """Read the bytes of those pictures whose content is not known, and have seen note it; drops
        what cannot be read."""
        problems, new = {}, []
        for index, picture in enumerate(self.pictures):
            try:
                look = self.looks[index] or _look(picture, seen)
                if look.digest is None:
                    stamp, digest = stamp_of(picture), digest_of(picture)
                    look = look._replace(digest=digest)
                    new.append((picture, stamp, f"{digest.hex()} {look.size[0]} {look.size[1]}"))
                self.looks[index] = look
            except BadImageError as error:
                problems[picture] = str(error)
            except OSError as error:
                problems[picture] = f"cannot be read ({error.strerror})"
        seen.note(new)
        self.drop(problems)

    def dress(self, trigger: str = "", prefix: str = "", suffix: str = "") -> None:
        """Put prefix, suffix and trigger words to every caption (captions.dressed)."""
        self.captions = [dressed(caption, trigger, prefix, suffix) for caption in self.captions]

    def fingerprint(self) -> str:
        """Count and digest of the pictures' names, sizes in bytes, captions and repeats, for a
        resumed run."""
        digest = hashlib.sha256()
        for index, (caption, repeats) in enumerate(zip(self.captions, self.repeats, strict=True)):
            look, often = self.looks[index], f"x {repeats}\n" if repeats != 1 else ""
            size = look.bytes if look else stamp_of(self.pictures[index]).size
            digest.update(
                f"{self.name(index)}\n{size}\n{caption}\n{often}".encode("utf-8", "surrogatepass")
            )
        return f"{len(self)} pictures ({digest.hexdigest()[:8]})"

    def drop(self, problems: dict[Path, str]) -> None:
        """Leave these pictures out, for the reasons given."""
        if not problems:
            return
        self.problems |= problems
        kept = [i for i, picture in enumerate(self.pictures) if picture not in problems]
        for name in (
            "pictures",
            "captions",
            "found",
            "remarks",
            "sources",
            "repeats",
            "folders",
            "cut",
            "looks",
        ):
            setattr(self, name, [getattr(self, name)[i] for i in kept])

    def epoch(self) -> list[int]:
        """The pictures' numbers as one epoch has them: each as often as it is repeated."""
        return [index for index, count in enumerate(self.repeats) for _ in range(count)]

    def by_folder(self) -> dict[str, tuple[int, list[str]]]:
        """Repeats and captions of each folder that has its own number (kohya's 10_name), and of all
        others together under the name of data_dir."""
        groups: dict[str, tuple[int, list[str]]] = {}
        names = {
            folder: folder.relative_to(self.data_dir).as_posix() for folder in set(self.folders)
        }
        names[self.data_dir] = self.data_dir.resolve().name
        for folder, repeats, caption in zip(self.folders, self.repeats, self.captions, strict=True):
            groups.setdefault(names[folder], (repeats, []))[1].append(caption)
        return groups

    def describe(self, crops: int | None, flip: bool) -> list[str]:
        """What was found and how it is read, in about three lines; crops counts those of all the
        pictures, or is None where every visit has one of its own."""
        folders = len({picture.parent for picture in self.pictures})
        place = f"{f'{folders} folders of ' if folders > 1 else ''}{self.data_dir}"
        cropped = "encoded anew at every visit" if crops is None else f"{crops} crops"
        lines = [
            f"pictures   {len(self)} in {place}, {cropped}{' with their mirror images' * flip}"
        ]
        if flip and (sided := sum(map(self.keeps_sides, range(len(self))))):
            lines.append(f"           not mirrored: {sided}, whose captions say left or right")
        lines.append(f"captions   {describe(self.sources)}")
        repeated = [
            f"{name} x {count}" for name, (count, _) in self.by_folder().items() if count > 1
        ]
        if repeated:
            more = f" and {len(repeated) - 8} more" if len(repeated) > 8 else ""
            lines.append(
                f"repeats    {', '.join(repeated[:8])}{more}: {sum(self.repeats)} pictures an epoch"
            )
        return lines

    def keeps_sides(self, index: int) -> bool:
        """Whether the picture must not be mirrored, because its caption would be wrong then."""
        return tells_a_side(self.captions[index])

    def name(self, index: int) -> str:
        """A picture's path within the folder, with / between its parts."""
        return self.pictures[index].as_posix()[self._above :]

    def forms(self, index: int, crops: int, flip: bool, seed: int | str) -> list[Form]:
        """Every form in which a picture is trained on: its crops (one in the middle, or drawn from
        the seed), and with flip the mirror image of each, unless it keeps its sides. Needs its
        header at most."""
        look = self.looks[index]
        width, height = look.size if look else image_size(self.pictures[index])
        rng, size = None, self._size_for(width, height)
        if not self.center_crop:
            own = f"{seed} {self.name(index)}".encode(
                "utf-8", "surrogatepass"
            )  # a name on Linux need not be Unicode
            rng = random.Random(own)
        boxes = crop_boxes(width, height, count=crops, rng=rng, shape=size)
        both = [False, True] if flip and not self.keeps_sides(index) else [False]
        return [Form(box, size, mirrored) for mirrored in both for box in boxes]

    def read(self, index: int, forms: Sequence[Form]) -> list[torch.Tensor]:
        """The picture in these forms, each float32 [3, H, W] in -1 ... 1."""
        image = open_image(self.pictures[index])
        upright = {}
        for box, size, _ in forms:
            if (
                box[2] > image.width or box[3] > image.height
            ):  # the header hid that it lies on its side
                box_there = crop_boxes(*image.size, count=1, rng=None, shape=size)[0]
            else:
                box_there = box
            if (box, size) not in upright:
                upright[box, size] = pixel_values(fit(image, box_there, size))
        return [
            upright[box, size].flip(-1) if mirrored else upright[box, size]
            for box, size, mirrored in forms
        ]

    def variants(self, index: int, crops: int, flip: bool, seed: int) -> list[torch.Tensor]:
        """The picture in all its forms."""
        return self.read(index, self.forms(index, crops, flip, seed))

    def _size_for(self, width: int, height: int) -> Size:
        return self.buckets.size_for(width, height) if self.buckets else (self.size, self.size)


def _look(picture: Path, seen: Stamps | None) -> Look:
    """Raises BadImageError where the picture is of no use."""
    try:
        stamp = stamp_of(picture)
    except OSError as error:
        raise BadImageError(f"cannot be read ({error.strerror})") from None
    if told := seen and seen.told(picture, stamp):
        digest, width, height = told.split()
        return Look((int(width), int(height)), stamp.size, bytes.fromhex(digest))
    return Look(image_size(picture), stamp.size)


def pixel_values(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 [3, H, W] in -1 ... 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1

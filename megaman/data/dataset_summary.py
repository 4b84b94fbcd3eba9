"""What a run says about its images, and what a resumed run recognizes them by."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from megaman.data.crops import LANCZOS
from megaman.data.folders import summarize_sources
from megaman.files import stamp_of

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset

MAX_FOLDERS = 8  # with repeats, in the summary


def summarize(dataset: MegaManDataset, num_crops: int | None, flip: bool) -> list[str]:
    """The images, captions and repeats in about three lines.

    num_crops is the number of crops of all images, or None if every visit has its own.
    """
    sources = summarize_sources(example.source for example in dataset.examples)
    lines = [_summarize_images(dataset, num_crops, flip), f"captions   {sources}"]
    if flip and (fixed := [i for i in range(len(dataset)) if not dataset.can_flip(i)]):
        note = f"           not mirrored: {len(fixed)}, whose captions say left or right"
        lines.insert(1, note)
    return lines + _summarize_repeats(dataset)


def _summarize_images(dataset: MegaManDataset, num_crops: int | None, flip: bool) -> str:
    folders = len({example.image.parent for example in dataset.examples})
    place = f"{folders} folders of {dataset.data_dir}" if folders > 1 else dataset.data_dir
    crops = "encoded anew at every visit" if num_crops is None else f"{num_crops} crops"
    mirrored = " with their mirror images" if flip else ""
    return f"images     {len(dataset)} in {place}, {crops}{mirrored}"


def _summarize_repeats(dataset: MegaManDataset) -> list[str]:
    counts = {name: repeats for name, (repeats, _) in dataset.by_folder().items()}
    repeated = [f"{name} x {count}" for name, count in counts.items() if count > 1]
    if not repeated:
        return []
    shown = ", ".join(repeated[:MAX_FOLDERS])
    if len(repeated) > MAX_FOLDERS:
        shown += f" and {len(repeated) - MAX_FOLDERS} more"
    total = sum(example.repeats for example in dataset.examples)
    return [f"repeats    {shown}: {total} images an epoch"]


def fingerprint(dataset: MegaManDataset) -> str:
    """Count and digest of the images' names, sizes in bytes, captions and repeats."""
    digest = hashlib.sha256()
    for index, example in enumerate(dataset.examples):
        info = example.info
        file_size = info.file_size if info else stamp_of(example.image).size
        text = f"{dataset.name(index)}\n{file_size}\n{example.caption}\n"
        if example.repeats != 1:
            text += f"x {example.repeats}\n"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return f"{len(dataset)} pictures ({digest.hexdigest()[:8]})"


def upscale_summary(dataset: MegaManDataset) -> str:
    """How images are enlarged: LANCZOS, or how many and which of them like pixel art."""
    examples = enumerate(dataset.examples)
    names = [dataset.name(index) for index, one in examples if one.info and one.info.cell]
    if not names:
        return LANCZOS
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()
    return f"nearest for {len(names)} ({digest[:8]}), else {LANCZOS}"

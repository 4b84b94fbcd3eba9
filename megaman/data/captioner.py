"""Captions that a model generates for images without one, as text files next to them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaman.data.caption_models import Captioner, load_captioner
from megaman.data.images import BadImageError, open_image
from megaman.data.problems import printable
from megaman.errors import UserError
from megaman.files import write_text
from megaman.runtime import release_memory

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset

log = logging.getLogger(__name__)

MAX_NAMED = 8  # images in a line


def caption_missing(
    name: str,
    dataset: MegaManDataset,
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> None:
    """Have the model with this name write a caption for every image of the dataset without one.

    The dataset itself does not change: read the folder again. Images that are not trained on,
    because a metadata file does not name them or their folder's number is 0, get none, and a line
    names them. No model is loaded if no caption is missing. Raises UserError as `load_captioner`
    and `write_captions` do.
    """
    extension = dataset.config.caption_extension or ".txt"
    images = [example.image for example in dataset.examples if not example.caption_from_file]
    missing = without_caption_file(images, extension)
    _report_sorted_out(dataset)
    if not missing:
        log.info("captions   none is missing: --auto_caption has nothing to do")
        return
    log.info("captions   %d are missing: %s writes them", len(missing), name)
    written = write_captions(load_captioner(name), missing, progress, extension)
    log.info(
        "           %d written as %s next to the images, for you to read and edit",
        written,
        extension,
    )
    release_memory()


def _report_sorted_out(dataset: MegaManDataset) -> None:
    """Name the images that get no caption because they are not trained on."""
    images = list(dataset.sorted_out)
    if images:
        names = [printable(str(image.relative_to(dataset.data_dir))) for image in images]
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        log.info(
            "captions   %d get none, since they are not trained on: %s%s (%s)",
            len(names),
            ", ".join(names[:MAX_NAMED]),
            more,
            dataset.sorted_out[images[0]],
        )


def without_caption_file(images: Iterable[Path], extension: str = ".txt") -> list[Path]:
    """The images without a file of this extension next to them, not even an empty one; the first of
    two that would share one.

    Raises UserError if one of their folders cannot be written, before a model is loaded.
    """
    missing: dict[Path, Path] = {}
    for image in images:
        target = image.with_suffix(extension)
        if not os.path.lexists(target):
            missing.setdefault(target, image)
    effective = os.access in os.supports_effective_ids
    for folder in {target.parent for target in missing}:
        if not os.access(folder, os.W_OK, effective_ids=effective):
            raise _cannot_write(folder, "not permitted")
    return list(missing.values())


def write_captions(
    captioner: Captioner,
    images: Sequence[Path],
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
    extension: str = ".txt",
) -> int:
    """Write a caption next to each image, in a text file with its stem; returns how many were
    written.

    An existing file does not change. Images that cannot be read get none. What has been written
    stays if the rest is interrupted. Raises UserError if a folder cannot be written.
    """
    num_written = 0
    batch: dict[Path, torch.Tensor] = {}
    for image in progress(images):
        with contextlib.suppress(BadImageError):  # reported with the folder's other problems
            batch[image] = captioner.pixel_values(open_image(image))
        if len(batch) >= captioner.batch_size:
            num_written += _write_batch(captioner, batch, extension)
            batch.clear()
    return num_written + _write_batch(captioner, batch, extension)


def _write_batch(captioner: Captioner, batch: dict[Path, torch.Tensor], extension: str) -> int:
    """Write the captions of these images; returns how many were written."""
    if not batch:
        return 0
    texts = captioner.generate_captions(torch.stack(list(batch.values())))
    pairs = zip(batch, texts, strict=True)
    return len([image for image, text in pairs if _write(image.with_suffix(extension), text)])


def _write(path: Path, text: str) -> bool:
    """Write a caption; False if it is empty or somebody has written one in the meantime."""
    if not text or os.path.lexists(path):
        return False
    try:
        write_text(path, f"{text}\n")
    except OSError as error:
        raise _cannot_write(path.parent, error.strerror or str(error)) from None
    return True


def _cannot_write(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder} cannot be written ({reason}), and captions go next to their images",
        "Make it writable, copy the images elsewhere, or drop --auto_caption",
    )

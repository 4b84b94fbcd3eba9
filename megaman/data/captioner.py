"""Captions written by BLIP (Li et al. 2022, arXiv 2201.12086) for pictures that lack one, as text
files beside them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

from megaman import hub
from megaman.data.captions import tidy
from megaman.data.images import BadImageError, open_image
from megaman.errors import UserError, summarize_error
from megaman.files import read_json, write_text
from megaman.models.base import ODD_CONFIGURATION
from megaman.runtime import choose_device, release_memory, retry_on_oom
from megaman.safe_loading import check_model_folder, refuse_pickle

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset

log = logging.getLogger(__name__)

AT_ONCE = 16  # pictures; more are hardly faster
WANTED = "BlipForConditionalGeneration"
SEARCH = {
    "num_beams": 3,
    "max_length": 20,
    "min_length": 5,
}  # as BLIP's authors caption, in words and parts of words
WAYS_ON = (
    "Name a local folder or Salesforce/blip-image-captioning-large, or leave --auto_caption out"
)


class Captioner:
    """BLIP on a device; it takes at_once pictures at a time, fewer where memory does not
    suffice."""

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        tokenizer: BertTokenizer,
        image_processor: BlipImageProcessorPil,
        at_once: int = AT_ONCE,
    ):
        self.model, self.tokenizer, self.image_processor, self.at_once = (
            model,
            tokenizer,
            image_processor,
            at_once,
        )

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """An RGB image of any size as the model sees it, whole: float32 [3, side, side]."""
        side = self.model.config.vision_config.image_size
        return self.image_processor(
            image, size={"height": side, "width": side}, return_tensors="pt"
        ).pixel_values[0]

    def describe(self, pixels: torch.Tensor) -> list[str]:
        """A caption on one line for each of the pictures [N, 3, side, side]; "" where the model has
        nothing to say."""
        ids = retry_on_oom(partial(self._generate, pixels), self._make_room)
        return [tidy(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def _generate(self, pixels: torch.Tensor) -> list[list[int]]:
        """Token ids for each picture, without the one that every caption starts with."""
        ids = []
        for part in pixels.split(self.at_once):
            drawn = self.model.generate(
                pixel_values=part.to(self.model.device, self.model.dtype), **SEARCH
            )
            ids += drawn[:, 1:].tolist()
        return ids

    def _make_room(self) -> None:
        if self.at_once == 1:
            raise UserError(
                "Captioning needs more memory than there is",
                "Take a smaller model or close other programs",
            )
        self.at_once //= 2


def load_captioner(name: str) -> Captioner:
    """BLIP from a local folder or the hub on the best device there is, in fp16 on CUDA and in
    float32 elsewhere.

    Raises UserError where it is missing, incomplete, damaged, a pickle or no BLIP for captions.
    """
    folder = _find(name)
    _check_kind(name, folder)
    check_model_folder(folder)
    device = choose_device()
    try:
        model, report = BlipForConditionalGeneration.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=torch.float16 if device.type == "cuda" else torch.float32,
            output_loading_info=True,
        )
        if missing := sorted(
            report["missing_keys"]
        ):  # the library would go on with random numbers in their place
            raise ValueError(f"it lacks {missing[0]}")
        tokenizer = BertTokenizer.from_pretrained(folder)
        image_processor = BlipImageProcessorPil.from_pretrained(
            folder
        )  # the one that needs no torchvision
    except (SafetensorError, OSError, *ODD_CONFIGURATION) as error:
        raise UserError(
            f"--auto_caption {name} cannot be loaded ({summarize_error(error)})", WAYS_ON
        ) from None
    return Captioner(model.to(device).eval(), tokenizer, image_processor)


def _find(name: str) -> Path:
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    refuse_pickle(name, WAYS_ON)
    if folder.is_file():
        raise UserError(f"--auto_caption {name} is a file, not a model's folder", WAYS_ON)
    return hub.download(
        "captioning model",
        name,
        [["*.json", "vocab.txt", "model*.safetensors"]],
        Path.is_dir,
        WAYS_ON,
    )


def _check_kind(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--auto_caption {name} holds no config.json, as a model in transformers' layout does",
            WAYS_ON,
        )
    content = read_json(folder / "config.json")
    config: dict[str, Any] = content if isinstance(content, dict) else {}
    kind, classes = config.get("model_type"), config.get("architectures") or [WANTED]
    if kind != "blip" or classes != [
        WANTED
    ]:  # BLIP's answers to questions come from another class of the same type
        found = f"a {kind!s:.40} ({classes!s:.80})"
        raise UserError(
            f"--auto_caption {name} is no BLIP that writes captions but {found}", WAYS_ON
        )
    if not list(folder.glob("*.safetensors")):
        held = (
            "only pickles (.bin), which can run code"
            if list(folder.glob("*.bin"))
            else "no .safetensors file"
        )
        raise UserError(
            f"--auto_caption {name} holds {held}, and nothing but safetensors is loaded", WAYS_ON
        )
    wanted = [
        ("tokenizer.json", "vocab.txt"),
        ("preprocessor_config.json", "processor_config.json"),
    ]
    for (
        names
    ) in wanted:  # the library would go on with a vocabulary of five words, or with its own numbers
        if not any((folder / file).is_file() for file in names):
            raise UserError(
                f"--auto_caption {name} is not complete: {names[0]} is missing", WAYS_ON
            )


def caption_missing(
    name: str,
    dataset: MegaManDataset,
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> None:
    """Have the model with this name write a caption for every image of the dataset without one.

    The dataset itself does not change: read the folder again. No model is loaded if no caption is
    missing. Raises UserError as load_captioner and write_captions do.
    """
    extension = dataset.config.caption_extension or ".txt"
    uncaptioned = [example.image for example in dataset.examples if not example.caption_from_file]
    missing = without_file(uncaptioned, extension)
    if not missing:
        log.info("captions   none is missing: --auto_caption has nothing to do")
        return
    log.info("captions   %d are missing: %s writes them", len(missing), name)
    written = write_captions(load_captioner(name), missing, progress, extension)
    log.info(
        "           %d written as %s next to the pictures, for you to read and edit",
        written,
        extension,
    )
    release_memory()


def without_file(pictures: Iterable[Path], extension: str = ".txt") -> list[Path]:
    """Those of the pictures that have no file of that extension beside them, not even an empty one;
    of two that would share one the first. Raises UserError where a folder among theirs cannot be
    written, before anybody waits for a model."""
    lacking: dict[Path, Path] = {}
    for picture in pictures:
        if not os.path.lexists(target := picture.with_suffix(extension)):
            lacking.setdefault(target, picture)
    for folder in {target.parent for target in lacking}:
        if not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise _cannot_write(folder, "not permitted")
    return list(lacking.values())


def write_captions(
    captioner: Captioner,
    pictures: Sequence[Path],
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
    extension: str = ".txt",
) -> int:
    """Write a caption beside each of the pictures, in a text file of its stem, and return how many
    were written.

    A file that is there stays as it is. Pictures that cannot be read get none. What is written
    stays when the rest is stopped. Raises UserError where a folder cannot be written.
    """
    written = 0
    waiting: dict[Path, torch.Tensor] = {}

    def write() -> int:
        texts = captioner.describe(torch.stack(list(waiting.values()))) if waiting else []
        return sum(
            _write(picture.with_suffix(extension), text)
            for picture, text in zip(waiting, texts, strict=True)
        )

    for picture in progress(pictures):
        with contextlib.suppress(BadImageError):  # reported with the other problems of the folder
            waiting[picture] = captioner.pixel_values(open_image(picture))
        if len(waiting) >= captioner.at_once:
            written += write()
            waiting.clear()
    return written + write()


def _write(path: Path, text: str) -> bool:
    if not text or os.path.lexists(path):  # somebody may have written one in the meantime
        return False
    try:
        write_text(path, f"{text}\n")
    except OSError as error:
        raise _cannot_write(path.parent, error.strerror or str(error)) from None
    return True


def _cannot_write(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder} cannot be written ({reason}), and captions stand beside their pictures",
        "Make it writable or copy the pictures elsewhere, or leave --auto_caption out",
    )

"""Models that describe an image in a sentence: BLIP (Li et al. 2022, arXiv 2201.12086) and
Florence-2 (Xiao et al. 2023, arXiv 2311.06242)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    BartTokenizer,
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Florence2ForConditionalGeneration,
)

from megaman import hub
from megaman.data.captions import tidy
from megaman.errors import UserError, summarize_error
from megaman.files import read_json
from megaman.models.base import CONFIGURATION_ERRORS
from megaman.runtime import choose_device, retry_on_oom
from megaman.safe_loading import check_model_folder, refuse_pickle

BATCH_SIZE = 16  # images; larger batches are hardly faster
# As their authors caption, except that Florence-2 may say no more than the text encoder reads;
# lengths in tokens.
BLIP_GENERATION: dict[str, Any] = {"num_beams": 3, "max_length": 20, "min_length": 5}
FLORENCE_GENERATION: dict[str, Any] = {"num_beams": 3, "max_length": 75, "do_sample": False}
# What Florence-2 was trained to answer with a detailed caption.
FLORENCE_PROMPT = "Describe in detail what is shown in the image."
# Many of these captions begin so; it describes nothing.
FLORENCE_OPENING = "The image shows "
FILES = ["*.json", "vocab.txt", "model*.safetensors"]
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
NATIVE_FLORENCE = "florence-community/Florence-2-base"
REMEDY = (
    f"Name a local folder, Salesforce/blip-image-captioning-large or {NATIVE_FLORENCE}, or drop "
    "--auto_caption"
)


class Captioner(ABC):
    """A captioning model on a device; batch_size is reduced if memory is short."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.batch_size = BATCH_SIZE

    @abstractmethod
    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """The whole of an RGB image of any size as the model sees it: float32 [3, side, side]."""

    @abstractmethod
    def _generate(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Token ids [B, length] of captions for images [B, 3, side, side] on the device."""

    def generate_captions(self, pixel_values: torch.Tensor) -> list[str]:
        """A caption on one line for each of the images [N, 3, side, side]; "" if the model
        generates nothing.

        Raises UserError if there is too little memory for a single image.
        """
        ids = retry_on_oom(partial(self._generate_all, pixel_values), self._reduce_memory)
        return [tidy(text) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def _generate_all(self, pixel_values: torch.Tensor) -> list[list[int]]:
        """Token ids for each image, without the start token."""
        ids: list[list[int]] = []
        for batch in pixel_values.split(self.batch_size):
            ids += self._generate(batch.to(self.model.device, self.model.dtype))[:, 1:].tolist()
        return ids

    def _reduce_memory(self) -> None:
        if self.batch_size == 1:
            raise UserError(
                "Captioning needs more memory than there is",
                "Use a smaller model or close other programs",
            )
        self.batch_size //= 2


class BlipCaptioner(Captioner):
    """BLIP."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any):
        super().__init__(model, tokenizer, image_processor)
        self._side: int = model.config.vision_config.image_size

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        size = {"height": self._side, "width": self._side}
        return self.image_processor(image, size=size, return_tensors="pt").pixel_values[0]

    def _generate(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.generate(pixel_values=pixel_values, **BLIP_GENERATION)


class FlorenceCaptioner(Captioner):
    """Florence-2, asked for a detailed caption. Raises ValueError if its files contradict each
    other."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any):
        super().__init__(model, tokenizer, image_processor)
        pixels = self.pixel_values(Image.new("RGB", (64, 32)))
        if pixels.shape[1] != pixels.shape[2]:
            raise ValueError("its image processor makes no squares")
        with torch.no_grad():
            images = pixels[None].to(model.device, model.dtype)
            num_image_tokens = model.get_image_features(images).pooler_output.shape[1]
        prompt = f"{tokenizer.bos_token}{FLORENCE_PROMPT}{tokenizer.eos_token}"
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        image_tokens = [model.config.image_token_id] * num_image_tokens
        self._input_ids = torch.tensor([image_tokens + ids], device=model.device)

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(image, return_tensors="pt").pixel_values[0]

    def generate_captions(self, pixel_values: torch.Tensor) -> list[str]:
        captions = super().generate_captions(pixel_values)
        return [caption.removeprefix(FLORENCE_OPENING) for caption in captions]

    def _generate(self, pixel_values: torch.Tensor) -> torch.Tensor:
        input_ids = self._input_ids.expand(len(pixel_values), -1)
        return self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixel_values,
            **FLORENCE_GENERATION,
        )


@dataclass(frozen=True)
class ModelKind:
    """The classes of a kind of model. Of each of required_files one is needed: without them the
    library would go on with a vocabulary of five words, or with defaults of its own."""

    architecture: type
    tokenizer: type
    image_processor: type  # one that does not need torchvision
    required_files: tuple[tuple[str, ...], ...]
    captioner: Callable[[Any, Any, Any], Captioner]


KINDS = {  # by model_type in config.json
    "blip": ModelKind(
        BlipForConditionalGeneration,
        BertTokenizer,
        BlipImageProcessorPil,
        (("tokenizer.json", "vocab.txt"), PREPROCESSOR_FILES),
        BlipCaptioner,
    ),
    "florence2": ModelKind(
        Florence2ForConditionalGeneration,
        BartTokenizer,
        CLIPImageProcessorPil,
        (("tokenizer.json",), PREPROCESSOR_FILES),
        FlorenceCaptioner,
    ),
}


def load_captioner(name: str) -> Captioner:
    """A model from a local folder or the hub on the best device, in fp16 on CUDA and in float32
    elsewhere.

    Raises UserError if it is missing, incomplete, damaged, a pickle or of another kind.
    """
    folder = _find_folder(name)
    kind = _find_kind(name, folder)
    _check_files(name, folder, kind)
    check_model_folder(folder)
    device = choose_device()
    try:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = _load_model(kind.architecture, folder, dtype).to(device).eval()
        tokenizer: Any = kind.tokenizer
        image_processor: Any = kind.image_processor
        return kind.captioner(
            model, tokenizer.from_pretrained(folder), image_processor.from_pretrained(folder)
        )
    except (SafetensorError, OSError, *CONFIGURATION_ERRORS) as error:
        reason = summarize_error(error)
        raise UserError(f"--auto_caption {name} cannot be loaded ({reason})", REMEDY) from None


def _load_model(architecture: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model on the CPU; raises ValueError if a tensor is missing."""
    loaded: Any = architecture.from_pretrained(
        folder, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # the library would go on with random numbers
        raise ValueError(f"it lacks {missing[0]}")
    return model


def _find_folder(name: str) -> Path:
    """The model's folder on this machine, downloaded if need be."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    refuse_pickle(name, REMEDY)
    if folder.is_file():
        raise UserError(f"--auto_caption {name} is a file, not a model's folder", REMEDY)
    return hub.download("captioning model", name, [FILES], Path.is_dir, REMEDY)


def _find_kind(name: str, folder: Path) -> ModelKind:
    """What kind of model config.json says it is; raises UserError for any that is not in KINDS."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--auto_caption {name} holds no config.json, as a model in transformers' layout does",
            REMEDY,
        )
    content = read_json(folder / "config.json")
    config: dict[str, Any] = content if isinstance(content, dict) else {}
    model_type = config.get("model_type")
    kind = KINDS.get(model_type) if isinstance(model_type, str) else None
    architectures = config.get("architectures")
    # BLIP for answers to questions is another architecture of the same type.
    if kind is None or (architectures and architectures != [kind.architecture.__name__]):
        actual = f"a {model_type!s:.40} ({architectures!s:.80})"
        raise UserError(
            f"--auto_caption {name} is no BLIP or Florence-2 that writes captions but {actual}",
            REMEDY,
        )
    if model_type == "florence2" and config.get("auto_map"):
        raise UserError(
            f"--auto_caption {name} is a Florence-2 that needs its authors' code, and no model's "
            "code is run",
            f"Take the same model in transformers' own format, such as {NATIVE_FLORENCE}",
        )
    return kind


def _check_files(name: str, folder: Path, kind: ModelKind) -> None:
    """Raise UserError unless weights and the kind's required files are there."""
    if not list(folder.glob("*.safetensors")):
        has_pickles = bool(list(folder.glob("*.bin")))
        pickles = "only pickles (.bin), which can run code"
        content = pickles if has_pickles else "no .safetensors file"
        raise UserError(
            f"--auto_caption {name} holds {content}, and nothing but safetensors is loaded", REMEDY
        )
    for names in kind.required_files:
        if not any((folder / file).is_file() for file in names):
            raise UserError(f"--auto_caption {name} is not complete: {names[0]} is missing", REMEDY)

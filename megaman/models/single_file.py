"""Stable Diffusion 1.x as one .safetensors file in its authors' layout, as used by A1111.

model.diffusion_model.…                          UNet
first_stage_model.…                              VAE
cond_stage_model.transformer.text_model.…        text encoder; some programs omit text_model.
model_ema.…, betas and others                    not used, as in A1111 and diffusers

Such a file has no configuration and no vocabulary: both are in sd15/. The hub is not used.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.errors import UserError
from megaman.files import read_json
from megaman.models.configs import SD15
from megaman.models.identify import BY_WIDTH, EMBEDDING, KEY, foreign_base, other_adapter
from megaman.models.weights import (
    BaseParts,
    LazyModel,
    build,
    missing,
    shape_mismatch,
    tensor_index,
)
from megaman.safe_loading import check_safetensors

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_ENCODER = "cond_stage_model.transformer."
PARTS = {UNET: "UNet", VAE: "VAE", TEXT_ENCODER: "text encoder"}
# Of one part; the UNet has 686, and diffusers compares all names with all blocks
MAX_TENSORS = 2000
# Other files, by the prefix of a name in them.
OTHER_KINDS = {
    "conditioner.": "SDXL",
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "control_model.": "a ControlNet",
}
FOLDER_PARTS = ("conv_in.", "down_blocks.", "encoder.down_blocks.", "text_model.", "embeddings.")
REMEDY = "Name a checkpoint of Stable Diffusion 1.x, or a folder in diffusers' layout"


def find_parts(path: Path, dtype: torch.dtype) -> BaseParts:
    """The parts of a base, whose models are loaded later: the VAE in float32, the others in dtype.

    The file may be in fp32, fp16, bf16 or fp8. Raises UserError if its header is false, if it is
    not Stable Diffusion 1.x, naming what it is, and if a tensor is missing or has another shape.
    """
    check_safetensors(path)
    tensors, metadata = tensor_index(path)
    refuse_others(path, metadata, tensors)
    unet, vae, text, schedule = (
        read_json(SD15 / f"{part}.json") for part in ("unet", "vae", "text_encoder", "scheduler")
    )
    if metadata.get("modelspec.prediction_type") == "v":
        schedule["prediction_type"] = "v_prediction"
    file = _File(path, tensors)
    return BaseParts(
        tokenizer=tokenizer(),
        noise_scheduler=cast(DDPMScheduler, DDPMScheduler.from_config(schedule)),
        unet=file.part(
            "unet",
            build(UNet2DConditionModel, unet),
            convert_ldm_unet_checkpoint(file.tensors_of(UNET), unet),
            dtype,
        ),
        vae=file.part(
            "vae",
            build(AutoencoderKL, vae),
            convert_ldm_vae_checkpoint(file.tensors_of(VAE), vae),
            torch.float32,
        ),
        text_encoder=file.part(
            "text_encoder",
            build(CLIPTextModel, CLIPTextConfig(**text)),
            _convert_text_encoder(file.tensors_of(TEXT_ENCODER)),
            dtype,
        ),
    )


def _convert_text_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(TEXT_ENCODER).removeprefix("text_model."): tensor
        for key, tensor in tensors.items()
    }


class _File:
    """A checkpoint whose tensors are mapped, not read."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self._path, self._tensors = path, tensors
        # diffusers' conversion renames tensors and keeps their addresses.
        self._keys = {tensor.data_ptr(): key for key, tensor in tensors.items()}

    def tensors_of(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one part, by their full names, as diffusers' conversion takes them."""
        tensors = {key: tensor for key, tensor in self._tensors.items() if key.startswith(prefix)}
        if not tensors:  # some files have no VAE
            raise UserError(
                f"{self._path} is incomplete: it has no {PARTS[prefix]} ({prefix}*)", REMEDY
            )
        if len(tensors) > MAX_TENSORS:
            raise UserError(
                f"{self._path} is no Stable Diffusion 1.x: {len(tensors)} tensors {prefix}*", REMEDY
            )
        return tensors

    def part(
        self,
        name: str,
        model: nn.Module,
        converted: Mapping[str, Tensor | None],
        dtype: torch.dtype,
    ) -> LazyModel:
        """One of the models, given its tensors under diffusers' names."""
        sources, found = {}, {}
        for tensor_name in model.state_dict():
            tensor = converted.get(tensor_name)
            if tensor is not None:
                key = self._keys[tensor.data_ptr()]
                original = self._tensors[key]
                sources[tensor_name] = (self._path, key)
                # The conversion may have cut something off, which the shape has to show.
                is_whole = tensor.numel() == original.numel()
                found[tensor_name] = tensor if is_whole else original
        self._check(model, found)
        return LazyModel(self._path, name, model, sources, dtype, [self._path])

    def _check(self, model: nn.Module, found: Mapping[str, Tensor]) -> None:
        kind = type(model).__name__
        if mismatch := shape_mismatch(model, found):
            raise UserError(f"{self._path} is no Stable Diffusion 1.x: {kind}'s {mismatch}", REMEDY)
        if name := missing(model, found):
            raise UserError(f"{self._path} is incomplete: {kind} lacks {name}", REMEDY)


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer; its vocabulary of 49,408 words follows from its merges by OpenAI's rule."""
    lines = gzip.decompress((SD15 / "merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines]
    # Printable bytes stand for themselves, the other 68 for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    words = [
        *characters,
        *(f"{character}</w>" for character in characters),
        *("".join(merge) for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {word: token for token, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, cast(Any, merges), model_max_length=77)


def refuse_others(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError, naming what it is, if a file is not a Stable Diffusion 1.x checkpoint."""
    has_unet = any(key.startswith(UNET) for key in tensors)
    kinds = (_kind_of(key, tensor) for key, tensor in tensors.items())
    kind = foreign_base(metadata, tensors) or next(filter(None, kinds), None)
    if not has_unet and any(_is_of_an_adapter(key) for key in tensors):
        of_kind = f" for {kind}" if kind else ""
        raise UserError(
            f"{path} is a LoRA{of_kind}, no base", "Name it in --lora_path, and here its base"
        )
    if kind:
        raise UserError(f"{path} is {kind}, not Stable Diffusion 1.x", REMEDY)
    if has_unet:
        _refuse_inpainting(path, tensors)
    elif any(key.startswith(FOLDER_PARTS) for key in tensors):
        raise UserError(
            f"{path} is one part of a base in diffusers' layout",
            "Name the folder with model_index.json",
        )
    elif any(key.startswith((VAE, "encoder.", "decoder.")) for key in tensors):
        raise UserError(f"{path} is a VAE alone, no base", REMEDY)
    else:
        holds = f"holds {min(tensors)[:200]!r}" if tensors else "is empty"
        raise UserError(f"{path} is no Stable Diffusion 1.x: it {holds}", REMEDY)


def _is_of_an_adapter(key: str) -> bool:
    return KEY.fullmatch(key) is not None or other_adapter(key) not in (None, EMBEDDING)


def _refuse_inpainting(path: Path, tensors: Mapping[str, Tensor]) -> None:
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if first is None or first.shape[:1] != (320,):
        return
    if first.ndim > 1 and first.shape[1] != 4:
        raise UserError(
            f"{path} is for inpainting or editing ({first.shape[1]} input channels)", REMEDY
        )


def _kind_of(key: str, tensor: Tensor) -> str | None:
    """Another model than Stable Diffusion 1.x, by a tensor's name or by the width of the
    prompt_embeds that it reads."""
    if key.endswith("attn2.to_k.weight") and tensor.ndim == 2 and tensor.shape[1] in BY_WIDTH:
        return BY_WIDTH[tensor.shape[1]]
    return next((kind for prefix, kind in OTHER_KINDS.items() if key.startswith(prefix)), None)

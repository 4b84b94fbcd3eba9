"""Stable Diffusion 1.5 as one .safetensors file in the layout of its authors' code, as A1111 and
ComfyUI take it.

model.diffusion_model.…                          UNet
first_stage_model.…                              VAE
cond_stage_model.transformer.text_model.…        text encoder; some programs leave text_model. out
model_ema.…, betas and whatever else there is    not used, as A1111 and diffusers do not use it

Such a file says nothing of its configuration and has no vocabulary: both are in sd15/. Nothing is
asked of the hub.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.errors import UserError
from megaman.files import read_json
from megaman.models.configs import SD15
from megaman.models.identify import KEY, RELATIVES, WIDTHS, foreign_base
from megaman.models.weights import LazyModel, build, missing, shape_mismatch, tensor_index
from megaman.safe_loading import check_safetensors

UNET, VAE, TEXT_ENCODER = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
)
PARTS = {UNET: "UNet", VAE: "VAE", TEXT_ENCODER: "text encoder"}
MOST_TENSORS = (
    2000  # of one part; the UNet has 686, and diffusers compares each name with each block
)
# Other files, by how a name in them begins.
KINDS = {
    "conditioner.": "SDXL",
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "control_model.": "a ControlNet",
}
FOLDER_PARTS = ("conv_in.", "down_blocks.", "encoder.down_blocks.", "text_model.", "embeddings.")
ANOTHER = "Name a checkpoint of Stable Diffusion 1.x, or a folder in diffusers' layout"


def find_parts(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Tokenizer and scheduler, and text encoder, VAE and UNet to be loaded later: the VAE in
    float32, the others in dtype.

    The file may be in fp32, fp16, bf16 or fp8. Raises UserError where its header lies, where it is
    not Stable Diffusion 1.x, named as what it is, and where a tensor is missing or of another
    shape.
    """
    check_safetensors(path)
    tensors, metadata = tensor_index(path)
    refuse_others(path, metadata, tensors)
    unet, vae, text, scheduler = (
        read_json(SD15 / f"{part}.json") for part in ("unet", "vae", "text_encoder", "scheduler")
    )
    keys = {
        tensor.data_ptr(): key for key, tensor in tensors.items()
    }  # conversion keeps the place, not the name

    def part(
        label: str, model: nn.Module, state: Mapping[str, torch.Tensor | None], dtype: torch.dtype
    ) -> LazyModel:
        found = {
            name: keys[state[name].data_ptr()]
            for name in model.state_dict()
            if state.get(name) is not None
        }
        _refuse_misfits(
            path, model, {name: _shaped(state[name], tensors[key]) for name, key in found.items()}
        )
        return LazyModel(
            path, label, model, {name: (path, key) for name, key in found.items()}, dtype, [path]
        )

    told = (
        {"prediction_type": "v_prediction"}
        if metadata.get("modelspec.prediction_type") == "v"
        else {}
    )
    state = convert_ldm_unet_checkpoint(_part(path, tensors, UNET), unet)
    parts = {"unet": part("unet", build(UNet2DConditionModel, unet), state, dtype)}
    state = convert_ldm_vae_checkpoint(_part(path, tensors, VAE), vae)
    parts["vae"] = part("vae", build(AutoencoderKL, vae), state, torch.float32)
    words = _part(path, tensors, TEXT_ENCODER).items()
    state = {
        key.removeprefix(TEXT_ENCODER).removeprefix("text_model."): tensor for key, tensor in words
    }
    parts["text_encoder"] = part(
        "text_encoder", build(CLIPTextModel, CLIPTextConfig(**text)), state, dtype
    )
    return {
        "tokenizer": tokenizer(),
        "scheduler": DDPMScheduler.from_config(scheduler, **told),
        **parts,
    }


def _part(path: Path, tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, by their whole names, as diffusers' conversion takes them."""
    part = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if not part:  # some were stored without their VAE
        raise UserError(f"{path} is not complete: it has no {PARTS[prefix]} ({prefix}*)", ANOTHER)
    if len(part) > MOST_TENSORS:
        raise UserError(
            f"{path} is no Stable Diffusion 1.x: {len(part)} tensors {prefix}*", ANOTHER
        )
    return part


def _shaped(converted: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """A tensor as it was converted, unless the conversion cut something off."""
    return converted if converted.numel() == original.numel() else original


def _refuse_misfits(path: Path, model: nn.Module, found: Mapping[str, torch.Tensor]) -> None:
    if words := shape_mismatch(model, found):
        raise UserError(
            f"{path} is no Stable Diffusion 1.x: {type(model).__name__}'s {words}", ANOTHER
        )
    if name := missing(model, found):
        raise UserError(f"{path} is not complete: {type(model).__name__} lacks {name}", ANOTHER)


def tokenizer() -> CLIPTokenizer:
    """CLIP's, from its merges alone: OpenAI's rule makes the vocabulary of 49,408 words out of
    them."""
    lines = gzip.decompress((SD15 / "merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines]
    shown = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # bytes that show; the other 68 get marks beyond them
    marks = list(map(chr, [*shown, *range(256, 512 - len(shown))]))
    words = [
        *marks,
        *(f"{mark}</w>" for mark in marks),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        {word: number for number, word in enumerate(words)}, merges, model_max_length=77
    )


def refuse_others(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raise UserError where a file is something else than a Stable Diffusion 1.x checkpoint, named
    as what it is."""
    whole = any(key.startswith(UNET) for key in tensors)
    kind = foreign_base(metadata, tensors) or next(
        filter(None, map(_kind_of, tensors, tensors.values())), None
    )
    if not whole and any(
        KEY.fullmatch(key) or any(part in key for part in RELATIVES) for key in tensors
    ):
        raise UserError(
            f"{path} is a LoRA{f' for {kind}' if kind else ''}, no base",
            "Name it in --lora_path, and here its base",
        )
    if kind:
        raise UserError(f"{path} is {kind}, not Stable Diffusion 1.x", ANOTHER)
    if whole:
        first = tensors.get(f"{UNET}input_blocks.0.0.weight")
        if first is not None and first.shape[:1] == (320,) and first.shape[1:2] not in ((4,), ()):
            raise UserError(
                f"{path} is for inpainting or editing ({first.shape[1]} input channels)", ANOTHER
            )
    elif any(key.startswith(FOLDER_PARTS) for key in tensors):
        raise UserError(
            f"{path} is one part of a base in diffusers' layout",
            "Name the folder with model_index.json",
        )
    elif any(key.startswith((VAE, "encoder.", "decoder.")) for key in tensors):
        raise UserError(f"{path} is a VAE alone, no base", ANOTHER)
    else:
        holds = f"holds {min(tensors)[:200]!r}" if tensors else "is empty"
        raise UserError(f"{path} is no Stable Diffusion 1.x: it {holds}", ANOTHER)


def _kind_of(key: str, tensor: torch.Tensor) -> str | None:
    """Another model, by one of its names or by the width of the text states that it reads."""
    width = tensor.shape[1] if key.endswith("attn2.to_k.weight") and tensor.ndim == 2 else None
    return WIDTHS.get(width) or next(
        (kind for start, kind in KINDS.items() if key.startswith(start)), None
    )

"""The base from a folder in diffusers' layout: model_index.json, and each part in a folder of its
own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.errors import UserError
from megaman.files import read_json
from megaman.models.configs import WAYS_ON, WEIGHTS
from megaman.models.weights import LazyModel, build, missing, shape_mismatch, tensor_index
from megaman.safe_loading import check_model_folder

# The published VAE of Stable Diffusion 1.5 has its attention by the names of diffusers before 0.12.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def find_parts(name: str, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Tokenizer and scheduler, and text encoder, VAE and UNet to be loaded later: the VAE in
    float32, the others in dtype.

    Raises UserError, and what the libraries raise, where something is missing, damaged or does not
    belong together.
    """
    _check_layout(name, folder)
    weights = {part: _weights(name, folder / part, stem) for part, stem in WEIGHTS.items()}
    for part in WEIGHTS:
        check_model_folder(folder / part)
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": DDPMScheduler.from_pretrained(folder / "scheduler"),
        "text_encoder": _part(folder, weights["text_encoder"], build(CLIPTextModel, text), dtype),
        "vae": _part(folder, weights["vae"], build(AutoencoderKL, vae), torch.float32),
        "unet": _part(folder, weights["unet"], build(UNet2DConditionModel, unet), dtype),
    }


def _check_layout(name: str, folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{name} holds no model_index.json, so it is no base in diffusers' layout", WAYS_ON
        )
    content = read_json(index)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != "StableDiffusionPipeline":
        raise UserError(f"The base {name} is a {kind}, not a Stable Diffusion 1.x", WAYS_ON)
    for part in (
        "tokenizer",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in WEIGHTS),
    ):
        if not (
            folder / part
        ).exists():  # the libraries would look for it on the hub, or take another model's
            raise UserError(f"The base {name} is not complete: {part} is missing", WAYS_ON)


def _weights(name: str, folder: Path, stem: str) -> Path:
    """A part's file of weights, or the list of its shards; of the fp16 variant where there are no
    others."""
    for ending in (".safetensors.index.json", ".safetensors", ".fp16.safetensors"):
        if (path := folder / f"{stem}{ending}").is_file():
            return path
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{name}: {folder.name}/ holds only .bin files, pickles, which can run code",
            "Take a copy of the base with .safetensors files",
        )
    raise UserError(f"{name}: {folder.name}/{stem}.safetensors is missing", WAYS_ON)


def _part(base: Path, weights: Path, model: torch.nn.Module, dtype: torch.dtype) -> LazyModel:
    """One of the models; raises ValueError where its files lack something or hold it in another
    shape."""
    folder, label = weights.parent, weights.parent.name
    files = [weights]
    if weights.suffix == ".json":
        files = [folder / shard for shard in sorted(set(read_json(weights)["weight_map"].values()))]
    there = {key: (path, tensor) for path in files for key, tensor in tensor_index(path)[0].items()}
    found, sources = {}, {}
    for name in model.state_dict():
        for key in filter(there.__contains__, _names_in_files(label, name)):
            path, found[name] = there[key]
            sources[name] = path, key
            break
    if words := shape_mismatch(model, found):
        raise ValueError(f"{label}: {words}")
    if lacking := missing(model, found):
        raise ValueError(f"{label} lacks {lacking}")
    return LazyModel(
        base,
        label,
        model,
        sources,
        dtype,
        [folder / "config.json", *dict.fromkeys([weights, *files])],
    )


def _names_in_files(part: str, name: str) -> Iterator[str]:
    """What a model's tensor may be called in a file."""
    yield name
    if part == "text_encoder":
        yield f"text_model.{name}"  # as all have it that transformers wrote before 5
    for new, old in OLD_NAMES.items():
        if f".{new}." in name:
            yield name.replace(f".{new}.", f".{old}.")

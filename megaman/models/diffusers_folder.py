"""A base in diffusers' layout: a folder with model_index.json and a subfolder for each part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.errors import UserError
from megaman.files import read_json
from megaman.models.configs import BASE_REMEDY, WEIGHTS
from megaman.models.weights import (
    BaseParts,
    LazyModel,
    build,
    missing,
    shape_mismatch,
    tensor_index,
)
from megaman.safe_loading import check_model_folder

# The names of attention layers before diffusers 0.12, as in Stable Diffusion 1.5's published VAE.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def find_parts(name: str, folder: Path, dtype: torch.dtype) -> BaseParts:
    """The parts of a base, whose models are loaded later: the VAE in float32, the others in dtype.

    Raises UserError, and what the libraries raise, if something is missing, damaged or does not
    match.
    """
    _check_layout(name, folder)
    weights = {part: _find_weights(name, folder / part, stem) for part, stem in WEIGHTS.items()}
    for part in WEIGHTS:
        check_model_folder(folder / part)
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    return BaseParts(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        noise_scheduler=cast(DDPMScheduler, scheduler),
        text_encoder=_part(folder, weights["text_encoder"], build(CLIPTextModel, text), dtype),
        vae=_part(folder, weights["vae"], build(AutoencoderKL, vae), torch.float32),
        unet=_part(folder, weights["unet"], build(UNet2DConditionModel, unet), dtype),
    )


def _check_layout(name: str, folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{name} holds no model_index.json, so it is no base in diffusers' layout", BASE_REMEDY
        )
    content = read_json(index)
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if kind != "StableDiffusionPipeline":
        raise UserError(f"The base {name} is a {kind}, not a Stable Diffusion 1.x", BASE_REMEDY)
    configs = [f"{part}/config.json" for part in WEIGHTS]
    for path in ("tokenizer", "scheduler/scheduler_config.json", *configs):
        # The libraries would look for it on the hub, or take another model's.
        if not (folder / path).exists():
            raise UserError(f"The base {name} is incomplete: {path} is missing", BASE_REMEDY)


def _find_weights(name: str, folder: Path, stem: str) -> Path:
    """A part's weight file or list of shards; the fp16 variant if there is no other."""
    for ending in (".safetensors.index.json", ".safetensors", ".fp16.safetensors"):
        if (path := folder / f"{stem}{ending}").is_file():
            return path
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{name}: {folder.name}/ holds only .bin files, pickles, which can run code",
            "Take a copy of the base with .safetensors files",
        )
    raise UserError(f"{name}: {folder.name}/{stem}.safetensors is missing", BASE_REMEDY)


def _part(base: Path, weights: Path, model: torch.nn.Module, dtype: torch.dtype) -> LazyModel:
    """One of the models; raises ValueError if its files lack a tensor or hold another shape."""
    folder, part = weights.parent, weights.parent.name
    files = [weights]
    if weights.suffix == ".json":
        files = [folder / shard for shard in sorted(set(read_json(weights)["weight_map"].values()))]
    stored: dict[str, tuple[Path, torch.Tensor]] = {}
    for path in files:
        stored |= {key: (path, tensor) for key, tensor in tensor_index(path)[0].items()}
    found, sources = {}, {}
    for name in model.state_dict():
        key = next((key for key in _names_in_files(part, name) if key in stored), None)
        if key is not None:
            path, found[name] = stored[key]
            sources[name] = path, key
    if mismatch := shape_mismatch(model, found):
        raise ValueError(f"{part}: {mismatch}")
    if name := missing(model, found):
        raise ValueError(f"{part} lacks {name}")
    all_files = [folder / "config.json", *dict.fromkeys([weights, *files])]
    return LazyModel(base, part, model, sources, dtype, all_files)


def _names_in_files(part: str, name: str) -> Iterator[str]:
    """The names that a model's tensor may have in a file."""
    yield name
    if part == "text_encoder":
        yield f"text_model.{name}"  # as transformers before 5 wrote it
    for new, old in OLD_NAMES.items():
        if f".{new}." in name:
            yield name.replace(f".{new}.", f".{old}.")

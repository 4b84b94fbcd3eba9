"""LoRA files of other programs: the names of kohya's and of diffusers' files, old and new, as layers of a model here.

kohya, A1111     lora_unet_M_with_underscores.lora_down.weight    lora_te_text_model_M.lora_up.weight    ….alpha
diffusers        unet.M.lora_A.weight                             text_encoder.text_model.M.lora_B.weight
diffusers 0.2x   unet.M.lora.down.weight                          text_encoder.….lora_linear_layer.up.weight
diffusers 0.1x   unet.….attn1.processor.to_q_lora.down.weight
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaman.adapter_config import HIGHEST_ALPHA
from megaman.errors import UserError

FITTING = "Name a LoRA that was trained on Stable Diffusion 1.x"
DOWN = ("lora_down", "lora.down", "lora_A", "lora_linear_layer.down")
UP = ("lora_up", "lora.up", "lora_B", "lora_linear_layer.up")
SIDE = "|".join(map(re.escape, (*DOWN, *UP)))
KEY = re.compile(rf"(?P<layer>.+?)(?:[._](?P<side>{SIDE})\.weight|\.alpha)")
PREFIXES = {"lora_unet_": "unet", "unet.": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
            "text_encoder.": "text_encoder"}  # fmt: skip
# What is trained and saved in the same way and is no plain LoRA, by a part of its names.
RELATIVES = {"hada_w": "LoHa", "lokr_w": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
             "lora_mid": "LoCon with a core tensor", "oft_": "OFT",
             "base_model.model.": "PEFT file without its adapter_config.json"}  # fmt: skip
# Other models, by what the header calls them, by a part of their layers' names, by the width of their text states.
TOLD = {"sdxl": "SDXL", "stable-diffusion-xl": "SDXL", "sd_v2": "Stable Diffusion 2.x", "flux": "Flux",
        "stable-diffusion-v2": "Stable Diffusion 2.x", "sd3": "Stable Diffusion 3", "stable-diffusion-3": "Stable "
        "Diffusion 3"}  # fmt: skip
NAMED = {"double_blocks": "Flux", "single_blocks": "Flux", "single_transformer_blocks": "Flux",
         "joint_blocks": "Stable Diffusion 3", "transformer.transformer_blocks": "Flux or Stable Diffusion 3",
         "lora_te2_": "SDXL", "text_encoder_2.": "SDXL", "lora_unet_input_blocks_": "SDXL",
         "lora_unet_output_blocks_": "SDXL"}  # fmt: skip
WIDTHS = {1024: "Stable Diffusion 2.x", 2048: "SDXL"}


def foreign_base(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the model that a LoRA is for, where it is not Stable Diffusion 1.x; by what its file says of itself,
    by its layers' widths, by their names."""
    said = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    if metadata.get("ss_v2") == "True":
        said += " sd_v2"
    by_word = (kind for word, kind in TOLD.items() if word in said)
    reading = re.compile(rf".*attn2[._](?:processor[._])?to_[kv][._](?:{'|'.join(map(re.escape, DOWN))})\.weight")
    widths = {tensor.shape[1] for key, tensor in tensors.items() if reading.fullmatch(key) and tensor.ndim >= 2}
    by_width = (WIDTHS[width] for width in widths & WIDTHS.keys())
    names = {} if 768 in widths else NAMED
    by_name = (kind for part, kind in names.items() if any(part in key for key in tensors))
    return next((kind for kinds in (by_word, by_width, by_name) for kind in kinds), None)


def refuse_foreign(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where a LoRA is for another kind of model, which is named."""
    if kind := foreign_base(metadata, tensors):
        raise UserError(f"{path} is a LoRA for {kind}, not for Stable Diffusion 1.x", FITTING)


def layers_of(
    path: Path, tensors: Mapping[str, torch.Tensor], models: Mapping[str, nn.Module]
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """A file's tensors under PEFT's bare names, and its alphas by layer, for each of the models that it changes.

    models are the UNet and the text encoder under the names unet and text_encoder. Raises UserError for what is no
    plain LoRA and for a layer that no model has.
    """
    known = {part: _by_underscores(model) for part, model in models.items()}
    found: dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if kind := next((kind for part, kind in RELATIVES.items() if part in key), None):
            raise UserError(f"{path} is a {kind}, not a plain LoRA", "Name a LoRA, or convert it to one")
        if match is None:
            raise UserError(f"{path} is no LoRA: it holds {key[:200]!r}", FITTING)
        part, layer = _place(match["layer"])
        name = known.get(part, {}).get(layer)
        if name is None:
            raise UserError(f"{path} is a LoRA for another base ({match['layer'][:200]!r} is not in this one)", FITTING)
        state, alphas = found.setdefault(part, ({}, {}))
        if match["side"] is None:
            alphas[name] = _alpha(path, key, tensor)
        else:
            side = "A" if match["side"] in DOWN else "B"
            weight = models[part].get_submodule(name).weight
            state[f"{name}.lora_{side}.weight"] = _as_the_layer(tensor, side, weight)
    return found


def _by_underscores(model: nn.Module) -> dict[str, str]:
    """The layers' names by what kohya makes of them. transformers 5 has no text_model. before its text encoder's."""
    named = (name for name, layer in model.named_modules() if isinstance(getattr(layer, "weight", None), torch.Tensor))
    return {name.replace(".", "_").removeprefix("text_model_"): name for name in named}


def _place(layer: str) -> tuple[str, str]:
    """The model that a file's name of a layer is in, and the layer's own name with underscores."""
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None)
    name = layer.removeprefix(prefix or "").replace(".", "_").removeprefix("text_model_").replace("_processor_", "_")
    return PREFIXES.get(prefix, "unet"), f"{name}_0" if name.endswith("_to_out") else name


def _alpha(path: Path, key: str, tensor: torch.Tensor) -> float:
    value = float(tensor.flatten()[0]) if tensor.numel() == 1 else 0.0
    if not 0 < value <= HIGHEST_ALPHA:
        raise UserError(f"{path}: {key[:200]!r} is no strength that a LoRA can have", FITTING)
    return value


def _as_the_layer(tensor: torch.Tensor, side: str, weight: torch.Tensor) -> torch.Tensor:
    """Some programs write a 1x1 convolution as a matrix, and others a matrix as a 1x1 convolution."""
    if tensor.ndim not in (2, 4) or tensor.ndim == weight.ndim:
        return tensor
    wanted = weight.shape[1:] if side == "A" else (1,) * (weight.ndim - 2)
    inner = tensor.shape[:1] if side == "A" else tensor.shape[:2]
    fits = tensor.numel() == torch.Size((*inner, *wanted)).numel()
    return tensor.reshape(*inner, *wanted) if fits else tensor


def told_config(metadata: Mapping[str, str], part: str) -> dict[str, Any] | None:
    """PEFT's configuration of a model's LoRA as diffusers keeps it in the header, unchecked; None where it is not."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "null"))
    except (ValueError, RecursionError):
        return None
    own = (
        {key: value for key, value in content.items() if key.startswith(f"{part}.")}
        if isinstance(content, dict)
        else {}
    )
    return {key.removeprefix(f"{part}."): value for key, value in own.items()} or None


def made_config(state: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's configuration that gives each layer the strength alpha / rank; without an alpha that is 1."""
    ranks = {name.removesuffix(".lora_A.weight"): len(tensor) for name, tensor in state.items() if ".lora_A." in name}
    strengths = {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(strengths.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": {_exactly(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {_exactly(name): own for name, own in strengths.items() if own != alpha},
    }


def _commonest(values: Iterable) -> Any:
    return Counter(values).most_common(1)[0][0]


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"

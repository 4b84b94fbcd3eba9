"""LoRA files of other programs: the names of kohya's and of diffusers' files, old and new, as
layers of a model here.

kohya, A1111     lora_unet_M_with_underscores.lora_down.weight    lora_te_text_model_M.lora_up.weight    ….alpha
diffusers        unet.M.lora_A.weight                             text_encoder.text_model.M.lora_B.weight
diffusers 0.2x   unet.M.lora.down.weight                          text_encoder.….lora_linear_layer.up.weight
diffusers 0.1x   unet.….attn1.processor.to_q_lora.down.weight

And the other way round kohya's layout, which A1111 and ComfyUI read, out of PEFT's tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from megaman.errors import UserError
from megaman.lora.adapter import ADAPTER, get_lora_config
from megaman.lora.peft_config import HIGHEST_ALPHA
from megaman.models.identify import DOWN, KEY, RELATIVES, foreign_base

FITTING = "Name a LoRA that was trained on Stable Diffusion 1.x"
PREFIXES = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
}

WEIGHTS = "megaman_lora.safetensors"
# A1111 and ComfyUI match the text encoder's layers with text_model in their names alone;
# transformers 5 dropped it.
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}


def refuse_foreign(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raise UserError where a LoRA is for another kind of model, which is named."""
    if kind := foreign_base(metadata, tensors):
        raise UserError(f"{path} is a LoRA for {kind}, not for Stable Diffusion 1.x", FITTING)


def to_peft(
    path: Path, tensors: Mapping[str, torch.Tensor], models: Mapping[str, nn.Module]
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """A file's tensors under PEFT's bare names, and its alphas by layer, for each of the models
    that it changes.

    models are the UNet and the text encoder under the names unet and text_encoder. Raises UserError
    for what is no plain LoRA and for a layer that no model has.
    """
    known = {part: _by_underscores(model) for part, model in models.items()}
    found: dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if kind := next((kind for part, kind in RELATIVES.items() if part in key), None):
            raise UserError(
                f"{path} is a {kind}, not a plain LoRA", "Name a LoRA, or convert it to one"
            )
        if match is None:
            raise UserError(f"{path} is no LoRA: it holds {key[:200]!r}", FITTING)
        part, layer = _place(match["layer"])
        name = known.get(part, {}).get(layer)
        if name is None:
            raise UserError(
                f"{path} is a LoRA for another base ({match['layer'][:200]!r} is not in this one)",
                FITTING,
            )
        state, alphas = found.setdefault(part, ({}, {}))
        if match["side"] is None:
            alphas[name] = _alpha(path, key, tensor)
        else:
            side = "A" if match["side"] in DOWN else "B"
            weight = models[part].get_submodule(name).weight
            state[f"{name}.lora_{side}.weight"] = _as_the_layer(tensor, side, weight)
    return found


def _by_underscores(model: nn.Module) -> dict[str, str]:
    """The layers' names by what kohya makes of them. transformers 5 has no text_model. before its
    text encoder's."""
    named = (
        name
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), torch.Tensor)
    )
    return {name.replace(".", "_").removeprefix("text_model_"): name for name in named}


def _place(layer: str) -> tuple[str, str]:
    """The model that a file's name of a layer is in, and the layer's own name with underscores."""
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None)
    name = (
        layer.removeprefix(prefix or "")
        .replace(".", "_")
        .removeprefix("text_model_")
        .replace("_processor_", "_")
    )
    return PREFIXES.get(prefix, "unet"), f"{name}_0" if name.endswith("_to_out") else name


def _alpha(path: Path, key: str, tensor: torch.Tensor) -> float:
    value = float(tensor.flatten()[0]) if tensor.numel() == 1 else 0.0
    if not 0 < value <= HIGHEST_ALPHA:
        raise UserError(f"{path}: {key[:200]!r} is no strength that a LoRA can have", FITTING)
    return value


def _as_the_layer(tensor: torch.Tensor, side: str, weight: torch.Tensor) -> torch.Tensor:
    """Some programs write a 1x1 convolution as a matrix, and others a matrix as a 1x1
    convolution."""
    if tensor.ndim not in (2, 4) or tensor.ndim == weight.ndim:
        return tensor
    wanted = weight.shape[1:] if side == "A" else (1,) * (weight.ndim - 2)
    inner = tensor.shape[:1] if side == "A" else tensor.shape[:2]
    fits = tensor.numel() == torch.Size((*inner, *wanted)).numel()
    return tensor.reshape(*inner, *wanted) if fits else tensor


def config_from_header(metadata: Mapping[str, str], part: str) -> dict[str, Any] | None:
    """PEFT's configuration of a model's LoRA as diffusers keeps it in the header, unchecked; None
    where it is not."""
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


def config_from_tensors(
    state: Mapping[str, torch.Tensor], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """PEFT's configuration that gives each layer the strength alpha / rank; without an alpha that
    is 1."""
    ranks = {
        name.removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in state.items()
        if ".lora_A." in name
    }
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


def to_kohya(
    states: Mapping[str, Mapping[str, torch.Tensor]], models: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """kohya's names for PEFT's tensors, with an .alpha for each module so that alpha / rank is the
    trained scale.

    states and models are by part: unet, text_encoder. Alpha stays in float32 whatever the rest is
    in: with rsLoRA it is no round number.
    """
    tensors = {}
    for part, state in states.items():
        for name, tensor in state.items():
            module, side = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
            stem = KOHYA_PREFIXES[part] + module.removeprefix("text_model.").replace(".", "_")
            tensors[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
            if side == "A":
                scale = models[part].get_submodule(module).scaling[ADAPTER]
                tensors[f"{stem}.alpha"] = torch.tensor(float(scale * len(tensor)))
    return tensors


def header(model: nn.Module, tensors: Mapping[str, torch.Tensor], base_name: str) -> dict[str, str]:
    """What A1111 needs to list the file as a LoRA for Stable Diffusion 1.x; model is any that
    carries the LoRA."""
    config = get_lora_config(model)
    alpha = (
        config.lora_alpha * config.r**0.5 if config.use_rslora else config.lora_alpha
    )  # kohya divides by the rank
    convolutions = any(tensor.ndim == 4 for tensor in tensors.values())
    arguments = {"conv_dim": str(config.r), "conv_alpha": f"{alpha:g}"} if convolutions else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(arguments),
        "ss_network_dropout": str(config.lora_dropout or None),
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": Path(base_name).name,
        "ss_output_name": Path(WEIGHTS).stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": Path(WEIGHTS).stem,
    }


def hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of all that follows the file's header: A1111 knows a LoRA by it, whatever the header
    says."""
    content = save(tensors)
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}

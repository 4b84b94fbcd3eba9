"""LoRA files of other programs: the keys of kohya's and diffusers' files, old and new, to PEFT's.

kohya, A1111     lora_unet_M_with_underscores.lora_down.weight
                 lora_te_text_model_M.lora_up.weight, ….alpha
diffusers        unet.M.lora_A.weight
                 text_encoder.text_model.M.lora_B.weight
diffusers 0.2x   unet.M.lora.down.weight
                 text_encoder.….lora_linear_layer.up.weight
diffusers 0.1x   unet.….attn1.processor.to_q_lora.down.weight
ComfyUI          diffusion_model.AUTHORS_M.lora_up.weight, .alpha (see authors_names)
                 text_encoders.clip_l.transformer.text_model.M.lora_up.weight
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from megaman.errors import UserError
from megaman.lora.authors_names import authors_names
from megaman.lora.peft_config import MAX_ALPHA, PEFT_PARTS, exact_pattern
from megaman.models.identify import DOWN, KEY, foreign_base, other_adapter

log = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
REMEDY = "Name a LoRA that was trained on Stable Diffusion 1.x"
PREFIXES = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "clip_l.transformer.": "text_encoder",
    "cond_stage_model.transformer.": "text_encoder",
}
# What some files hold next to a LoRA, by the beginning of a key and by the end of one.
EMBEDDINGS = "bundle_emb."
BIASES_AND_NORMS = (".diff", ".diff_b", ".w_norm", ".b_norm", ".bias")
UNUSED_LAYERS = ("text_projection", "logit_scale")  # Stable Diffusion 1.x does without them


def refuse_foreign(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raise UserError, naming the other model, if a LoRA is not for Stable Diffusion 1.x."""
    if kind := foreign_base(metadata, tensors):
        raise UserError(f"{path} is a LoRA for {kind}, not for Stable Diffusion 1.x", REMEDY)


Layers = tuple[dict[str, torch.Tensor], dict[str, float]]  # PEFT's tensors, alphas by layer


def without_extras(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file's layers; what else it holds is named in a line, as far as it matters.

    That are textual inversion embeddings, trained biases and norms, and layers that Stable
    Diffusion 1.x does not use.
    """
    plain, embeddings, others = {}, [], []
    for key, tensor in tensors.items():
        if key.startswith(EMBEDDINGS):
            embeddings.append(key.split(".")[1])
        elif tensor.ndim < 2 and key.endswith(BIASES_AND_NORMS):
            if tensor.any():
                others.append(key)
        elif not any(layer in key for layer in UNUSED_LAYERS):
            plain[key] = tensor
    ignored = []
    if embeddings:
        names = list(dict.fromkeys(embeddings))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        ignored.append(f"the bundled embeddings {', '.join(names[:5])[:300]}{more}")
    if others:
        ignored.append(f"trained biases and norms ({len(others)} tensors)")
    if ignored:
        log.info(f"{path}: {' and '.join(ignored)} are ignored; its LoRA is used")
    return plain


def split_peft(
    tensors: Mapping[str, torch.Tensor], part: str
) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of PEFT's file by part: those of the folder's own part, and those of others.

    PEFT around a module that holds the models, such as a training script's, puts unet. or
    text_encoder. in front of the names of their layers. So does who renames diffusers' file.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        holder = next((other for other in PEFT_PARTS if name.startswith(f"{other}.")), None)
        bare = name.removeprefix(f"{holder}.")
        parts.setdefault(holder or part, {})[bare] = tensor
    return parts


def from_peft(
    folder: Path, tensors: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's file under the model's own names of its layers.

    Raises UserError for anything but a plain LoRA.
    """
    layers = {name for name, _ in model.named_modules()}
    state = {}
    for key, tensor in tensors.items():
        match = _match(folder, key.removeprefix(PEFT_PREFIX))
        if match["side"] not in ("lora_A", "lora_B"):
            raise UserError(f"{folder} is no PEFT folder: it holds {key[:200]!r}", REMEDY)
        layer = match["layer"]
        # transformers 5 dropped text_model. from the names of the text encoder's layers.
        for other in (layer.removeprefix("text_model."), f"text_model.{layer}"):
            if layer not in layers and other in layers:
                layer = other
        state[f"{layer}.{match['side']}.weight"] = tensor
    return state


def to_peft(
    path: Path, tensors: Mapping[str, torch.Tensor], models: Mapping[str, nn.Module]
) -> dict[str, Layers]:
    """A file's tensors under PEFT's bare names, and its alphas by layer, for each model it changes.

    models are the UNet and the text encoder under the names unet and text_encoder. Raises UserError
    for anything but a plain LoRA, and for a layer that no model has.
    """
    layers = {part: _layers_by_underscores(model) for part, model in models.items()}
    found: dict[str, Layers] = {}
    for key, tensor in tensors.items():
        match = _match(path, key)
        part, layer = _locate(match["layer"])
        name = layers.get(part, {}).get(layer)
        if name is None:
            layer_name = match["layer"][:200]
            raise UserError(
                f"{path} is a LoRA for another base ({layer_name!r} is not in this one)", REMEDY
            )
        state, alphas = found.setdefault(part, ({}, {}))
        if match["side"] is None:
            alphas[name] = _alpha(path, key, tensor)
        else:
            side = "A" if match["side"] in DOWN else "B"
            weight = cast(torch.Tensor, models[part].get_submodule(name).weight)
            state[f"{name}.lora_{side}.weight"] = _reshape(tensor, side, weight)
    return found


def for_parts(
    path: Path, tensors: Mapping[str, torch.Tensor], parts: Collection[str]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of a file's LoRAs for these models, and the names of its other models."""
    part_of = {key: _locate(_match(path, key)["layer"])[0] for key in tensors}
    kept = {key: tensor for key, tensor in tensors.items() if part_of[key] in parts}
    return kept, set(part_of.values()) - set(parts)


def refuse_other_adapter(path: Path, key: str) -> None:
    """Raise UserError, naming what it is, if a tensor of this name is another adapter's."""
    if kind := other_adapter(key):
        article = "an" if kind.startswith(("OFT", "IA3")) else "a"
        raise UserError(
            f"{path} is {article} {kind}, not a plain LoRA", "Name a LoRA, or convert it to one"
        )


def _match(path: Path, key: str) -> re.Match[str]:
    """The parts of a key; raises UserError for one of another adapter than a plain LoRA."""
    refuse_other_adapter(path, key)
    match = KEY.fullmatch(key)
    if match is None and key.endswith(".weight"):
        raise UserError(f"{path} is no LoRA: it holds the whole layer {key[:200]!r}", REMEDY)
    if match is None:
        raise UserError(f"{path} is no plain LoRA: it holds {key[:200]!r}", REMEDY)
    return match


def _layers_by_underscores(model: nn.Module) -> dict[str, str]:
    """The names of a model's layers by kohya's form of them.

    The text encoder's have no text_model_ here, as transformers 5 names them. The UNet's are also
    there by their authors' names.
    """
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), torch.Tensor)
    ]
    found = {name.replace(".", "_").removeprefix("text_model_"): name for name in names}
    for theirs, name in authors_names(name for name, _ in model.named_modules()).items():
        if name in names:
            found[theirs.replace(".", "_")] = name
    return found


def _locate(layer: str) -> tuple[str, str]:
    """The model that a layer in a file belongs to, and the layer's name with underscores."""
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), "")
    name = layer.removeprefix(prefix).replace(".", "_")
    name = name.removeprefix("text_model_").replace("_processor_", "_")
    return PREFIXES.get(prefix, "unet"), f"{name}_0" if name.endswith("_to_out") else name


def _alpha(path: Path, key: str, tensor: torch.Tensor) -> float:
    value = float(tensor.flatten()[0]) if tensor.numel() == 1 else 0.0
    if not 0 < value <= MAX_ALPHA:
        raise UserError(f"{path}: {key[:200]!r} is not a valid alpha", REMEDY)
    return value


def _reshape(tensor: torch.Tensor, side: str, weight: torch.Tensor) -> torch.Tensor:
    """A tensor with as many dimensions as the layer's weight, if it has the right size.

    Some programs write a 1x1 convolution as a matrix, and others a matrix as a 1x1 convolution.
    """
    if tensor.ndim not in (2, 4) or tensor.ndim == weight.ndim:
        return tensor
    if side == "A":
        shape = torch.Size((*tensor.shape[:1], *weight.shape[1:]))
    else:
        shape = torch.Size((*tensor.shape[:2], *[1] * (weight.ndim - 2)))
    return tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor


def config_from_header(metadata: Mapping[str, str], part: str) -> dict[str, Any] | None:
    """PEFT's configuration of a model's LoRA in the header of diffusers' file, not validated.

    None if the header has none.
    """
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    prefix = f"{part}."
    config = {key: value for key, value in content.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in config.items()} or None


def config_from_tensors(
    state: Mapping[str, torch.Tensor], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """PEFT's configuration that scales each layer by alpha / rank, or by 1 without an alpha."""
    ranks = {
        name.removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in state.items()
        if ".lora_A." in name
    }
    layer_alphas = {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(layer_alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": exact_pattern(ranks, rank),
        "alpha_pattern": exact_pattern(layer_alphas, alpha),
    }


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]

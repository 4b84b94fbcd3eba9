"""A trained LoRA to the three layouts that programs read.

The keys of module M = down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q:

    PEFT        adapter_model.safetensors          base_model.model.M.lora_A.weight
    diffusers   pytorch_lora_weights.safetensors   unet.M.lora_A.weight
    kohya       megaman_lora.safetensors           lora_unet_M_with_underscores.lora_down.weight

Alpha is in adapter_config.json, in the header's lora_adapter_metadata, and in an .alpha tensor for
each module, respectively. A text encoder's LoRA is in the same file, except for PEFT, where it has
a subfolder text_encoder/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import nn

from megaman.errors import UserError
from megaman.files import replacing_folder, write_json
from megaman.lora.adapter import ADAPTER, get_lora_config
from megaman.lora.files import TEXT_ENCODER, Tensors
from megaman.lora.formats import PEFT_PREFIX
from megaman.lora.notes import only_notes
from megaman.lora.peft_config import DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS

# diffusers before 0.42 needs the text_model. that transformers 5 dropped; newer ones accept both.
DIFFUSERS_PREFIXES = {"unet": "unet.", TEXT_ENCODER: "text_encoder.text_model."}
# A1111 and ComfyUI need that text_model too.
KOHYA_PREFIXES = {"unet": "lora_unet_", TEXT_ENCODER: "lora_te_text_model_"}
NO_TEXTS: Mapping[str, str] = MappingProxyType({})
NO_FILES: Mapping[str, bytes] = MappingProxyType({})
PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def adapter_state(model: nn.Module, precision: str = "float") -> Tensors:
    """The LoRA's tensors on the CPU under PEFT's bare names: M.lora_A.weight, M.lora_B.weight.

    precision is a key of PRECISIONS.
    """
    dtype, suffix = PRECISIONS[precision], f".{ADAPTER}.weight"
    return {
        name.removesuffix(suffix) + ".weight": tensor.detach().cpu().contiguous().to(dtype)
        for name, tensor in model.named_parameters()
        if ".lora_" in name and name.endswith(suffix)
    }


def write_tensors(path: Path, tensors: Tensors, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file; raises UserError if the disk is full or not writable."""
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be written ({error})", "Free some space or choose another folder"
        ) from None


def write_peft(
    folder: Path,
    models: Mapping[str, nn.Module],
    base_name: str,
    notes: Mapping[str, str] = NO_TEXTS,
    states: Mapping[str, Tensors] | None = None,
) -> None:
    """Write PEFT's two files into an existing folder, those of a text encoder into text_encoder/.

    models are those with a LoRA, by part; notes are for the header (lora.notes); states are the
    tensors as `adapter_state` gives them, if they are known.
    """
    for part, model in models.items():
        subfolder = folder if part == "unet" else folder / part
        subfolder.mkdir(exist_ok=True)
        state = adapter_state(model) if states is None else states[part]
        tensors = {PEFT_PREFIX + name: tensor for name, tensor in state.items()}
        write_tensors(subfolder / PEFT_WEIGHTS, tensors, {"format": "pt", **notes})
        config = {**config_dict(model), "base_model_name_or_path": base_name}
        write_json(subfolder / PEFT_CONFIG, config)


def save_lora(
    folder: Path,
    models: Mapping[str, nn.Module],
    base_name: str,
    metadata: Mapping[str, str],
    precision: str = "float",
    extra_files: Mapping[str, bytes] = NO_FILES,
) -> None:
    """Write lora_weights/ in all three layouts, replacing the folder in one step.

    Args:
        models: those with a LoRA, by part.
        metadata: strings for the header of kohya's file, such as ss_steps; the keys of lora.notes
            go into the other two as well.
        precision: a key of PRECISIONS.
        extra_files: content by name, such as the model card.
    """
    states = {part: adapter_state(model, precision) for part, model in models.items()}
    with replacing_folder(folder) as aside:
        notes = only_notes(metadata)
        write_peft(aside, models, base_name, notes, states)
        _write_diffusers(aside / DIFFUSERS_WEIGHTS, models, states, notes)
        _write_kohya(aside / KOHYA_WEIGHTS, models, states, base_name, metadata)
        for name, content in extra_files.items():
            (aside / name).write_bytes(content)


def _write_diffusers(
    path: Path,
    models: Mapping[str, nn.Module],
    states: Mapping[str, Tensors],
    notes: Mapping[str, str],
) -> None:
    config: dict[str, Any] = {}
    tensors: Tensors = {}
    for part, model in models.items():
        # diffusers loads dropout in training mode and would then sample with it.
        values = {**config_dict(model), "lora_dropout": 0.0}
        config |= {f"{part}.{key}": value for key, value in values.items()}
        prefix = DIFFUSERS_PREFIXES[part]
        tensors |= {prefix + name: tensor for name, tensor in states[part].items()}
    text = json.dumps(config, indent=2, sort_keys=True)
    write_tensors(path, tensors, {"format": "pt", "lora_adapter_metadata": text, **notes})


def _write_kohya(
    path: Path,
    models: Mapping[str, nn.Module],
    states: Mapping[str, Tensors],
    base_name: str,
    metadata: Mapping[str, str],
) -> None:
    tensors = to_kohya(states, models)
    header = _kohya_header(models["unet"], tensors, base_name)
    hashes = _hashes(tensors)
    write_tensors(path, tensors, {**header, **metadata, **hashes})


def to_kohya(
    states: Mapping[str, Mapping[str, torch.Tensor]], models: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """PEFT's tensors under kohya's keys, each module with the .alpha that gives its trained scale.

    states and models are by part: unet, text_encoder. Alpha is float32 whatever the dtype of the
    rest: with rsLoRA it is no round number.
    """
    tensors = {}
    for part, state in states.items():
        for name, tensor in state.items():
            module, side = name.removesuffix(".weight").rsplit(".lora_", maxsplit=1)
            stem = KOHYA_PREFIXES[part] + module.removeprefix("text_model.").replace(".", "_")
            direction = "down" if side == "A" else "up"
            tensors[f"{stem}.lora_{direction}.weight"] = tensor
            if side == "A":
                layer = cast(LoraLayer, models[part].get_submodule(module))
                alpha = layer.scaling[ADAPTER] * len(tensor)
                tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _kohya_header(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], base_name: str
) -> dict[str, str]:
    """The metadata that A1111 needs to list the file as a LoRA for Stable Diffusion 1.x.

    model is any that has the LoRA.
    """
    config = get_lora_config(model)
    # kohya divides by the rank, not by its root.
    alpha = config.lora_alpha * config.r**0.5 if config.use_rslora else config.lora_alpha
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
        "ss_output_name": Path(KOHYA_WEIGHTS).stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": Path(KOHYA_WEIGHTS).stem,
    }


def _hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The SHA-256 of all that follows the file's header, by which A1111 recognizes a LoRA."""
    content = save(tensors)
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}


def config_dict(model: nn.Module) -> dict[str, Any]:
    """PEFT's configuration as JSON holds it, with sets as sorted lists.

    The base's name is removed: transformers puts in a path on this machine.
    """
    config = {**get_lora_config(model).to_dict(), "base_model_name_or_path": None}
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }

"""kohya's layout, which A1111 and ComfyUI read, out of PEFT's tensors: names, an .alpha a module, the header."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from megaman.lora import ADAPTER, describe

WEIGHTS = "megaman_lora.safetensors"
# A1111 and ComfyUI match the text encoder's layers with text_model in their names alone; transformers 5 dropped it.
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}


def renamed(
    states: Mapping[str, Mapping[str, torch.Tensor]], models: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """kohya's names for PEFT's tensors, with an .alpha for each module so that alpha / rank is the trained scale.

    states and models are by part: unet, text_encoder. Alpha stays in float32 whatever the rest is in: with rsLoRA it is
    no round number.
    """
    tensors = {}
    for part, state in states.items():
        for name, tensor in state.items():
            module, side = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
            stem = PREFIXES[part] + module.removeprefix("text_model.").replace(".", "_")
            tensors[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
            if side == "A":
                scale = models[part].get_submodule(module).scaling[ADAPTER]
                tensors[f"{stem}.alpha"] = torch.tensor(float(scale * len(tensor)))
    return tensors


def header(model: nn.Module, tensors: Mapping[str, torch.Tensor], base_name: str) -> dict[str, str]:
    """What A1111 needs to list the file as a LoRA for Stable Diffusion 1.x; model is any that carries the LoRA."""
    config = describe(model)
    alpha = config.lora_alpha * config.r**0.5 if config.use_rslora else config.lora_alpha  # kohya divides by the rank
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
    """SHA-256 of all that follows the file's header: A1111 knows a LoRA by it, whatever the header says."""
    content = save(tensors)
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}

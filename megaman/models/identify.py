"""What kind of model a file is for: by what its header says, by its layers' widths, by its tensors'
names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

DOWN = ("lora_down", "lora.down", "lora_A", "lora_linear_layer.down")
UP = ("lora_up", "lora.up", "lora_B", "lora_linear_layer.up")
SIDE = "|".join(map(re.escape, (*DOWN, *UP)))
KEY = re.compile(rf"(?P<layer>.+?)(?:[._](?P<side>{SIDE})\.weight|\.alpha)")
# What is trained and saved in the same way and is no plain LoRA, by a part of its names.
RELATIVES = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a core tensor",
    "oft_": "OFT",
    "base_model.model.": "PEFT file without its adapter_config.json",
}
# Other models, by what the header calls them, by a part of their layers' names, by the width of
# their text states.
TOLD = {
    "sdxl": "SDXL",
    "stable-diffusion-xl": "SDXL",
    "sd_v2": "Stable Diffusion 2.x",
    "flux": "Flux",
    "stable-diffusion-v2": "Stable Diffusion 2.x",
    "sd3": "Stable Diffusion 3",
    "stable-diffusion-3": "Stable Diffusion 3",
}
NAMED = {
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
    "transformer.transformer_blocks": "Flux or Stable Diffusion 3",
    "lora_te2_": "SDXL",
    "text_encoder_2.": "SDXL",
    "lora_unet_input_blocks_": "SDXL",
    "lora_unet_output_blocks_": "SDXL",
}
WIDTHS = {1024: "Stable Diffusion 2.x", 2048: "SDXL"}


def foreign_base(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the model that a LoRA is for, where it is not Stable Diffusion 1.x; by what its
    file says of itself, by its layers' widths, by their names."""
    said = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    if metadata.get("ss_v2") == "True":
        said += " sd_v2"
    by_word = (kind for word, kind in TOLD.items() if word in said)
    reading = re.compile(
        rf".*attn2[._](?:processor[._])?to_[kv][._](?:{'|'.join(map(re.escape, DOWN))})\.weight"
    )
    widths = {
        tensor.shape[1]
        for key, tensor in tensors.items()
        if reading.fullmatch(key) and tensor.ndim >= 2
    }
    by_width = (WIDTHS[width] for width in widths & WIDTHS.keys())
    names = {} if 768 in widths else NAMED
    by_name = (kind for part, kind in names.items() if any(part in key for key in tensors))
    return next((kind for kinds in (by_word, by_width, by_name) for kind in kinds), None)

"""The model that a file is for, by its header, by its layers' widths and by its tensors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

DOWN = ("lora_down", "lora.down", "lora_A", "lora_linear_layer.down")
UP = ("lora_up", "lora.up", "lora_B", "lora_linear_layer.up")
SIDE = "|".join(map(re.escape, (*DOWN, *UP)))
KEY = re.compile(rf"(?P<layer>.+?)(?:[._](?P<side>{SIDE})\.weight|\.alpha)")
# Adapters that are trained and saved like a LoRA but are none, by a part of their tensors' names.
OTHER_ADAPTERS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a core tensor",
    "oft_": "OFT",
    "base_model.model.": "PEFT file without its adapter_config.json",
}
# Other models by their name in the header, by a part of their layers' names, and by the width of
# their prompt_embeds.
BY_HEADER = {
    "sdxl": "SDXL",
    "stable-diffusion-xl": "SDXL",
    "sd_v2": "Stable Diffusion 2.x",
    "flux": "Flux",
    "stable-diffusion-v2": "Stable Diffusion 2.x",
    "sd3": "Stable Diffusion 3",
    "stable-diffusion-3": "Stable Diffusion 3",
}
BY_LAYER_NAME = {
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
BY_WIDTH = {1024: "Stable Diffusion 2.x", 2048: "SDXL"}


SD15_WIDTH = 768
READS_PROMPT = re.compile(
    rf".*attn2[._](?:processor[._])?to_[kv][._](?:{'|'.join(map(re.escape, DOWN))})\.weight"
)


def foreign_base(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the model that a LoRA is for, None if it is Stable Diffusion 1.x or unknown.

    The header comes first, then the layers' widths, then their names.
    """
    header_keys = ("ss_base_model_version", "modelspec.architecture")
    header = " ".join(metadata.get(key, "") for key in header_keys).lower()
    if metadata.get("ss_v2") == "True":
        header += " sd_v2"
    for word, kind in BY_HEADER.items():
        if word in header:
            return kind
    readers = [tensor for key, tensor in tensors.items() if READS_PROMPT.fullmatch(key)]
    widths = {tensor.shape[1] for tensor in readers if tensor.ndim >= 2}
    for width in widths & BY_WIDTH.keys():
        return BY_WIDTH[width]
    if SD15_WIDTH in widths:
        return None
    for part, kind in BY_LAYER_NAME.items():
        if any(part in key for key in tensors):
            return kind
    return None

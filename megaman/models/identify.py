"""The model that a file is for, by its header, by its layers' widths and by its tensors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain

import torch

DOWN = ("lora_down", "lora.down", "lora_A", "lora_linear_layer.down")
UP = ("lora_up", "lora.up", "lora_B", "lora_linear_layer.up")
SIDE = "|".join(map(re.escape, (*DOWN, *UP)))
# Some programs leave PEFT's name of the adapter, default, in the key.
KEY = re.compile(rf"(?P<layer>.+?)(?:[._](?P<side>{SIDE})(?:\.default)?\.weight|\.alpha)")
EMBEDDING = "textual inversion embedding"
# Adapters that are trained and saved like a LoRA but are none, by a part of their tensors' names.
OTHER_ADAPTERS = {
    "lora_embedding_": "LoRA of an embedding layer",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "lora_mid": "LoCon with a core tensor",
    "boft_": "BOFT",
    "oft_": "OFT",
    "ia3_l": "IA3",
    ".on_input": "IA3",
    "vera_lambda": "VeRA",
    "emb_params": EMBEDDING,
    "string_to_param": EMBEDDING,
    "base_model.model.": "PEFT file without its adapter_config.json",
}
# The same, by the end of the names.
OTHER_ENDINGS = {
    ".diff": "file with whole weight differences",
    ".set_weight": "file with whole weights",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
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
    "clip_g.": "SDXL",
    "label_emb": "SDXL",
    "t5xxl": "Flux or Stable Diffusion 3",
    "lora_unet_input_blocks_": "SDXL",
    "lora_unet_output_blocks_": "SDXL",
}
# Layers in kohya's form of the authors' names that SDXL does not have.
NOT_SDXL = re.compile(r"lora_unet_(input_blocks_([12]_1|10|11)|output_blocks_([678]_1|9|10|11))_.*")
BY_WIDTH = {1024: "Stable Diffusion 2.x", 2048: "SDXL"}


SD15_HEADERS = ("sd_v1", "stable-diffusion-v1")
READS_PROMPT = re.compile(
    rf".*attn2[._](?:processor[._])?to_[kv][._](?:{'|'.join(map(re.escape, DOWN))})\.weight"
)


def other_adapter(key: str) -> str | None:
    """What a tensor of this name belongs to if it is an adapter other than a plain LoRA."""
    parts = (kind for part, kind in OTHER_ADAPTERS.items() if part in key)
    endings = (kind for end, kind in OTHER_ENDINGS.items() if key.endswith(end))
    return next(chain(parts, endings), None)


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
    if widths or any(word in header for word in SD15_HEADERS):
        return None  # of another width, as the embedded base's, the layers decide
    if any(NOT_SDXL.fullmatch(key) for key in tensors):
        return None
    for part, kind in BY_LAYER_NAME.items():
        if any(part in key for key in tensors):
            return kind
    return None

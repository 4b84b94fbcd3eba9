"""The UNet's layers by the names that Stable Diffusion's authors gave them, as ComfyUI uses them.

Their code (CompVis/stable-diffusion, openaimodel.py) counts the blocks of each half through, where
diffusers counts levels and the blocks of a level:

    down_blocks.0.attentions.1.proj_in   input_blocks.2.1.proj_in
    up_blocks.3.resnets.2.conv1          output_blocks.11.0.in_layers.2
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

SINGLE_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def authors_names(modules: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a UNet's modules by the authors' names of those that have one."""
    names = set(modules)
    blocks = {**dict(_blocks_down(names)), **dict(_blocks_up(names))}
    blocks |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    found = {SINGLE_LAYERS[name]: name for name in names & SINGLE_LAYERS.keys()}
    for name in names:
        parts = name.split(".")
        # A block's name has three or four parts; a sampler's convolution is a layer itself.
        for size in (3, 4, 5):
            block, layer = ".".join(parts[:size]), ".".join(parts[size:])
            if block in blocks:
                layer = RESNET_LAYERS.get(layer, layer)
                found[f"{blocks[block]}.{layer}".rstrip(".")] = name
    return found


def _blocks_down(names: set[str]) -> Iterator[tuple[str, str]]:
    number = 1
    for level in _indices(names, "down_blocks"):
        for place in _indices(names, f"{level}.resnets"):
            yield from _resnet_and_attention(place, f"input_blocks.{number}")
            number += 1
        if f"{level}.downsamplers.0" in names:
            yield f"{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def _blocks_up(names: set[str]) -> Iterator[tuple[str, str]]:
    number = 0
    for level in _indices(names, "up_blocks"):
        for place in _indices(names, f"{level}.resnets"):
            yield from _resnet_and_attention(place, f"output_blocks.{number}")
            number += 1
        after_attention = 2 if f"{level}.attentions" in names else 1
        yield f"{level}.upsamplers.0.conv", f"output_blocks.{number - 1}.{after_attention}.conv"


def _resnet_and_attention(resnet: str, block: str) -> Iterator[tuple[str, str]]:
    yield resnet, f"{block}.0"
    yield resnet.replace(".resnets.", ".attentions."), f"{block}.1"


def _indices(names: set[str], stem: str) -> Iterator[str]:
    """stem.0, stem.1 and so on, as far as there are such modules."""
    index = 0
    while f"{stem}.{index}" in names:
        yield f"{stem}.{index}"
        index += 1

"""Bases with random weights, and synthetic images, to measure with.

    python benchmarks/random_bases.py sd15 /tmp/sd15       # Stable Diffusion 1.5's shape, 4 GB
    python benchmarks/random_bases.py mid /tmp/mid         # a medium size for 128 px, 0.2 GB

The weights are float32 safetensors, as the published ones are. The tokenizer is the embedded
base's, since CLIP's vocabulary comes with the real model only. Such a base generates noise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "base"

# Configurations of UNet, VAE and text encoder; all other values are those of Stable Diffusion 1.5.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sd15": (
        {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "block_out_channels": (320, 640, 1280, 1280),
        },
        {"sample_size": 512, "block_out_channels": (128, 256, 512, 512)},
        {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
    ),
    "mid": (
        {"sample_size": 16, "cross_attention_dim": 256, "block_out_channels": (64, 128, 256, 256)},
        {"sample_size": 128, "block_out_channels": (32, 64, 128, 128)},
        {
            "vocab_size": 3156,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "projection_dim": 256,
        },
    ),
}

COLORS = {
    "red": (200, 40, 40),
    "orange": (230, 130, 30),
    "yellow": (235, 215, 60),
    "green": (50, 160, 70),
    "cyan": (60, 190, 200),
    "blue": (45, 80, 200),
    "purple": (130, 60, 170),
    "brown": (120, 80, 50),
    "grey": (128, 128, 128),
    "white": (245, 245, 245),
}
FIGURES = ("disc", "square", "triangle")
CAPTIONS = len(COLORS) ** 2 * len(FIGURES)  # distinct ones


def make_base(shape: str, folder: Path) -> Path:
    """Write a base of a shape with random weights from a fixed seed, unless the folder exists.

    Returns the folder, which never exists half-written.
    """
    if folder.is_dir():
        return folder
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, vae, text = SHAPES[shape]
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    torch.manual_seed(0)
    model = UNet2DConditionModel(attention_head_dim=8, **unet)
    model.save_pretrained(part / "unet", max_shard_size="20GB")
    del model
    AutoencoderKL(
        down_block_types=cast(Any, ("DownEncoderBlock2D",) * 4),
        up_block_types=cast(Any, ("UpDecoderBlock2D",) * 4),
        layers_per_block=2,
        **vae,
    ).save_pretrained(part / "vae")
    CLIPTextModel(CLIPTextConfig(**text)).save_pretrained(part / "text_encoder")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(part / "scheduler")
    shutil.copytree(DEMO / "tokenizer", part / "tokenizer")
    shutil.copy(DEMO / "model_index.json", part)
    os.replace(part, folder)
    return folder


def picture(number: int, side: int):
    """A figure on a shaded, grainy background: as a PNG as large and as slow to read as a photo."""
    import numpy as np
    from PIL import Image, ImageDraw

    color, ground, figure = _words(number)
    rng = np.random.default_rng(number)
    shade = np.linspace(0.6, 1.1, side, dtype=np.float32)[:, None, None]
    image = Image.fromarray(
        (np.broadcast_to(shade, (side, side, 1)) * COLORS[ground]).clip(0, 255).astype(np.uint8)
    )
    x, y, radius = rng.uniform((0.35, 0.35, 0.15), (0.65, 0.65, 0.3)) * side
    box, fill = (x - radius, y - radius, x + radius, y + radius), COLORS[color]
    draw = ImageDraw.Draw(image)
    if figure == "disc":
        draw.ellipse(box, fill)
    else:
        draw.regular_polygon((x, y, radius), {"square": 4, "triangle": 3}[figure], fill=fill)
    grain = rng.integers(-6, 7, (side, side, 3), dtype=np.int16)
    return Image.fromarray((np.asarray(image, np.int16) + grain).clip(0, 255).astype(np.uint8))


def caption(number: int) -> str:
    """A description of the image with this number; there are CAPTIONS different ones."""
    color, ground, figure = _words(number)
    return f"a {color} {figure} on a {ground} ground"


def make_pictures(folder: Path, count: int, side: int = 512, captions: str = "txt") -> Path:
    """Write count PNGs with captions in text files ("txt") or in metadata.jsonl ("jsonl"), unless
    the folder exists.

    Returns the folder, which never exists half-written.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for number in range(count):
        picture(number, side).save(part / f"picture_{number:06d}.png")
        if captions == "txt":
            (part / f"picture_{number:06d}.txt").write_text(caption(number), encoding="utf-8")
    if captions == "jsonl":
        write_metadata(
            part, {f"picture_{number:06d}.png": caption(number) for number in range(count)}
        )
    os.replace(part, folder)
    return folder


def write_metadata(folder: Path, captions: dict[str, str]) -> None:
    """Write metadata.jsonl as for Hugging Face's imagefolder, from captions by file name."""
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _words(number: int) -> tuple[str, str, str]:
    """Color, background and figure of the image with this number."""
    names = list(COLORS)
    rest, color = divmod(number, len(names))
    rest, figure = divmod(rest, len(FIGURES))
    return names[color], names[(rest + color + 1) % len(names)], FIGURES[figure]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(make_base(options.shape, options.folder))


if __name__ == "__main__":
    main()

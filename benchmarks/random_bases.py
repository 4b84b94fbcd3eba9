"""Base folders with random weights, and pictures that a program drew: something to measure with.

    python benchmarks/random_bases.py sd15 /tmp/sd15         Stable Diffusion 1.5's exact configuration, about 4 GB
    python benchmarks/random_bases.py mid /tmp/mid           a middle size, made for 128 px, about 0.2 GB

The weights are float32 safetensors, as the published ones are. The tokenizer is the embedded
base's, since CLIP's own vocabulary comes with the real model only. What such a base draws is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "base"

# Configurations by shape: UNet, VAE, text encoder. Whatever is not said here is as in Stable
# Diffusion 1.5.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sd15": (
        {"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)},
        {"sample_size": 512, "block_out_channels": (128, 256, 512, 512)},
        {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "projection_dim": 768},
    ),
    "mid": (
        {"sample_size": 16, "cross_attention_dim": 256, "block_out_channels": (64, 128, 256, 256)},
        {"sample_size": 128, "block_out_channels": (32, 64, 128, 128)},
        {"vocab_size": 3156, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 4, "projection_dim": 256},
    ),
}  # fmt: skip

COLOURS = {
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
CAPTIONS = len(COLOURS) ** 2 * len(FIGURES)  # distinct ones


def make_base(shape: str, folder: Path) -> Path:
    """A base in diffusers' layout with random weights in that shape, from a fixed seed; one that is
    there is kept.

    Returns the folder. It appears whole or not at all.
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
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
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
    """A figure on a shaded, grainy ground, so that a PNG of it is as large and as slow to read as a
    photograph's."""
    import numpy as np
    from PIL import Image, ImageDraw

    colour, ground, figure = _words(number)
    rng = np.random.default_rng(number)
    shade = np.linspace(0.6, 1.1, side, dtype=np.float32)[:, None, None]
    image = Image.fromarray(
        (np.broadcast_to(shade, (side, side, 1)) * COLOURS[ground]).clip(0, 255).astype(np.uint8)
    )
    x, y, radius = rng.uniform((0.35, 0.35, 0.15), (0.65, 0.65, 0.3)) * side
    box, fill = (x - radius, y - radius, x + radius, y + radius), COLOURS[colour]
    draw = ImageDraw.Draw(image)
    if figure == "disc":
        draw.ellipse(box, fill)
    else:
        draw.regular_polygon((x, y, radius), {"square": 4, "triangle": 3}[figure], fill=fill)
    grain = rng.integers(-6, 7, (side, side, 3), dtype=np.int16)
    return Image.fromarray((np.asarray(image, np.int16) + grain).clip(0, 255).astype(np.uint8))


def caption(number: int) -> str:
    """What is to be seen in the picture with that number; CAPTIONS different ones."""
    colour, ground, figure = _words(number)
    return f"a {colour} {figure} on a {ground} ground"


def make_pictures(folder: Path, count: int, side: int = 512, captions: str = "txt") -> Path:
    """So many PNGs with captions as text files beside them ("txt") or in metadata.jsonl ("jsonl"),
    as the peer wants them; a folder that is there is kept. Returns the folder. It appears whole or
    not at all."""
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
    """metadata.jsonl as for Hugging Face's imagefolder: captions by the file's name."""
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _words(number: int) -> tuple[str, str, str]:
    """Colour, ground and figure of the picture with that number."""
    names = list(COLOURS)
    rest, colour = divmod(number, len(names))
    rest, figure = divmod(rest, len(FIGURES))
    return names[colour], names[(rest + colour + 1) % len(names)], FIGURES[figure]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(make_base(options.shape, options.folder))


if __name__ == "__main__":
    main()

"""Draw the pictures that keep the base in place while a LoRA learns the hero: what the base itself
draws today.

    python demo/make_kept.py       once demo/base/ is made; writes images/kept_*.png

Without them "a blue robot" would soon be the hero as well, since its captions say "blue robot" too.
Training on the model's own pictures of the wider class next to the new ones is DreamBooth's prior
preservation (Ruiz et al. 2022, arXiv 2208.12242).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

HERE = Path(__file__).resolve().parent
SIDE = 256  # pixels, as the other pictures have
PROMPTS = [
    "a blue robot, antenna, city background",
    "a blue robot, round eyes, green hills background",
    "a blue robot, snow background",
    "a red robot, goggles, starry night background",
    "a green robot, one eye, brick wall background",
    "a yellow robot, aerial, city background",
    "a purple robot head, snow background",
    "an orange cat, hat, green hills background",
    "a green monster, sunset background",
    "a pixel art person, red shirt, brick wall background",
]


def main() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(HERE / "base")
    pipeline.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(PROMPTS, start=1):
        generator = torch.Generator().manual_seed(number)
        result: Any = pipeline(
            prompt, generator=generator, num_inference_steps=30, guidance_scale=4.0
        )
        image = result.images[0]
        stem = HERE / "images" / f"kept_{number:02d}"
        image.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(
            stem.with_suffix(".png"), optimize=True
        )
        stem.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

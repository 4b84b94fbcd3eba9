"""The command that generates an image of the gallery again."""

from __future__ import annotations

import unicodedata
from typing import Any

from megaman import shell
from megaman.pages.gallery_images import GalleryImage

FLAGS = {
    "base": "--base_model",
    "strength": "--lora_scale",
    "steps": "--num_inference_steps",
    "guidance": "--guidance_scale",
    "sampler": "--scheduler",
    "clip skip": "--clip_skip",
}
CONTROL_CHARACTERS = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories


def command(image: GalleryImage) -> str | None:
    """The command that generates the image again, for sh, or for PowerShell on Windows.

    None if a text has a control character: shells differ in what they make of a pasted one.
    """
    flags = {FLAGS[name]: image.settings[name] for name in FLAGS if name in image.settings}
    values = {
        "--prompts": image.prompt,
        "--negative_prompt": image.negative_prompt,
        "--seed": image.seed,
        "--height": image.height,
        "--width": image.width,
        **flags,
    }
    loras: list[Any] = list(image.loras)
    if not loras and "LoRA" in image.settings:
        loras = [image.settings["LoRA"]]
    if any(_has_control_character(str(text)) for text in (*values.values(), *loras)):
        return None
    words = [f"{flag}={shell.quote(str(value))}" for flag, value in values.items()]
    if len(loras) == 1:
        words.append(f"--lora_path={shell.quote(str(loras[0]))}")
    elif loras:
        words = ["--lora_path", *(shell.quote(str(lora)) for lora in loras), *words]
    return " ".join(["python generate_megaman.py", *words])


def _has_control_character(text: str) -> bool:
    return any(unicodedata.category(character) in CONTROL_CHARACTERS for character in text)

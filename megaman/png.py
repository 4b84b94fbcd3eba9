"""Pictures that carry their own settings: A1111's parameters text in a PNG chunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megaman.files import replacing


def parameters_text(prompt: str, negative_prompt: str, values: dict[str, Any]) -> str:
    """A1111's text: the prompt, the negative prompt, then one line of "Name: value" pairs.

    A value with a comma, a colon, a quote or a line break in it becomes a JSON string, as A1111 writes and reads it.
    """
    pairs = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    return f"{prompt}\n{negative}{pairs}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value


THUMBNAIL = 256  # pixels of the longer side


def save_thumbnail(path: Path, image: Image.Image) -> None:
    """Write a small WebP for the gallery where the image is much larger: a browser keeps what it has decoded."""
    if max(image.size) > 1.2 * THUMBNAIL:
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        with replacing(path) as aside:
            small.save(aside, format="WEBP", quality=85)


def save_png(path: Path, image: Image.Image, parameters: str, others: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write the image with its parameters text and other texts by their keys, whole or not at all."""
    info = PngInfo()
    for key, text in {"parameters": parameters, **others}.items():
        info.add_itxt(key, text)
    with replacing(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)

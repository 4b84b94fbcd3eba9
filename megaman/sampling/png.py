"""Generated images as files: PNGs with texts in them, and their thumbnails."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megaman.data.png_chunks import END, SIGNATURE
from megaman.files import replacing

THUMBNAIL = 256  # pixels of the longer side


def a1111_text(prompt: str, negative_prompt: str, values: dict[str, Any]) -> str:
    """A1111's text: the prompt, the negative prompt, then one line of "Name: value" pairs.

    A value with a comma, a colon, a quote or a line break in it becomes a JSON string, as A1111
    writes and reads it.
    """
    pairs = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    return f"{prompt}\n{negative}{pairs}"


def _quoted(value: str) -> str:
    if any(mark in value for mark in ',:"\n'):
        return json.dumps(value, ensure_ascii=False)
    return value


def needs_thumbnail(size: tuple[int, int]) -> bool:
    """Whether an image is so large that the gallery shows a small copy: a browser keeps what it
    has decoded in memory."""
    return max(size) > 1.2 * THUMBNAIL


def save_thumbnail(path: Path, image: Image.Image) -> None:
    """Write a small WebP for the gallery if the image needs one."""
    if needs_thumbnail(image.size):
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        with replacing(path) as aside:
            small.save(aside, format="WEBP", quality=85)


def save_png(
    path: Path,
    image: Image.Image,
    parameters: str,
    others: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the image with its parameters text and other texts by key, in one step."""
    info = text_chunks({"parameters": parameters, **others})
    with replacing(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)


def text_chunks(texts: Mapping[str, str]) -> PngInfo:
    """Texts by key, as Pillow takes them to write a PNG."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    return info


def read_prompt(path: Path) -> str | None:
    """The prompt in the parameters text of a PNG of ours, on one line; None if there is none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get("parameters")
    except (OSError, ValueError, SyntaxError):
        return None
    if not isinstance(text, str) or "\nSteps: " not in text:
        return None
    prompt = re.split(r"\nNegative prompt: |\nSteps: ", text, maxsplit=1)[0]
    return " ".join(prompt.split())


def is_whole(path: Path) -> bool:
    """Whether a file is a PNG with all its chunks and their right checksums, up to the last one.

    The pixels are not decoded. Raises OSError if the file cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return False
        while True:
            head = file.read(8)  # the length of the chunk's data, and its type
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if len(head) < 8 or file.tell() + length + 4 > size:
                return False
            checksum = zlib.crc32(file.read(length), zlib.crc32(kind))
            if checksum != int.from_bytes(file.read(4), "big"):
                return False
            if kind == END:
                return True

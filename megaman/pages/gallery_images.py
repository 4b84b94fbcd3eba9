"""The images of a gallery as images.json holds them, next to the page that shows them."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.errors import UserError
from megaman.files import read_json

IMAGES = "images.json"


@dataclass(frozen=True)
class NearestImage:
    """The training image that is nearest to an image; is_near means suspiciously.

    distance is in levels of 255 (data.similarity); preview is a file relative to the gallery's
    folder, None if the training image was not there.
    """

    name: str
    distance: float
    is_near: bool
    preview: str | None = None


@dataclass(frozen=True)
class GalleryImage:
    """One image and all settings that generate it again; width and height in pixels."""

    file: str  # relative to the gallery's folder
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    settings: dict[str, str | int | float]  # shown in this order with these names
    base_file: str | None = None  # the same seed without the LoRA
    loras: list[str] = field(default_factory=list)  # NAME:STRENGTH as for --lora_path
    nearest: NearestImage | None = None
    pixel_file: str | None = None  # the same image as pixel art


_is_text, _is_int = schema.instance(str), schema.instance(int)
CHECKS = {
    "file": _is_text,
    "prompt": _is_text,
    "negative_prompt": _is_text,
    "seed": _is_int,
    "width": _is_int,
    "height": _is_int,
    "settings": schema.instance(dict),
    "base_file": schema.instance(str, type(None)),
    "loras": schema.instance(list),
    "nearest": schema.instance(NearestImage, type(None)),
    "pixel_file": schema.instance(str, type(None)),
}
_is_nearest = schema.record(
    {
        "name": _is_text,
        "distance": schema.number(0, 1e6),
        "is_near": schema.instance(bool),
        "preview": schema.instance(str, type(None)),
    },
    exact=True,
)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def read_images(folder: Path) -> list[GalleryImage]:
    """The images in folder/images.json, if there is one; raises UserError if it is damaged."""
    path = folder / IMAGES
    _, records = read_gallery(path)
    return [_image(path, number, record) for number, record in enumerate(records, start=1)]


def read_gallery(path: Path) -> tuple[str, list[Any]]:
    """The gallery's id and records; for the first galleries, bare lists, the id is new."""
    content = read_json(path) if path.exists() else []
    if isinstance(content, list):
        content = {"gallery": secrets.token_hex(8), "images": content}
    if not isinstance(content, dict) or content.keys() != {"gallery", "images"}:
        raise _broken(path, "it holds neither a list nor an object with gallery and images")
    gallery, records = content["gallery"], content["images"]
    if not _is_id(gallery) or not isinstance(records, list):
        raise _broken(path, "gallery is no id of 16 digits, or images is no list")
    try:
        json.dumps(records, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _broken(path, "a text in it is not valid Unicode") from None
    return gallery, records


def _image(path: Path, number: int, record: Any) -> GalleryImage:
    """The image of an entry, counted from 1; raises UserError if the entry is not valid."""
    if not isinstance(record, dict):
        raise _broken(path, f"entry {number} is not an object")
    nearest = record.get("nearest")
    if isinstance(nearest, dict) and _is_nearest(nearest):
        record = {**record, "nearest": NearestImage(**nearest)}
    try:
        image = GalleryImage(**record)
    except TypeError:  # an unknown or a missing field
        names = ", ".join(field.name for field in fields(GalleryImage))
        raise _broken(path, f"entry {number} does not have the fields {names}") from None
    if name := schema.first_invalid(vars(image), CHECKS):
        raise _broken(path, f"{name} of entry {number} is of the wrong kind")
    return image


def _broken(path: Path, reason: str) -> UserError:
    message = f"{path} is not a gallery's list of images: {reason}"
    return UserError(message, "Remove it or choose another --output_dir")

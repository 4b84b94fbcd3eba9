"""The page of results: images.json for programs and index.html for people, beside the images they name."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megaman.errors import UserError
from megaman.files import read_json, write_json, write_text

TEMPLATES = Path(__file__).parent / "templates"
IMAGES, PAGE = "images.json", "index.html"


@dataclass(frozen=True)
class GalleryImage:
    """One image and all that is needed to make it again; width and height in pixels."""

    file: str  # relative to the gallery's folder
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    settings: dict[str, str | int | float]  # shown in this order and under these names
    base_file: str | None = None  # the same seed without the LoRA


FIELD_TYPES = {"file": str, "prompt": str, "negative_prompt": str, "seed": int, "width": int, "height": int,
               "settings": dict, "base_file": str | None}  # fmt: skip


def read_images(folder: Path) -> list[GalleryImage]:
    """The images that folder/images.json names, none where it is missing; UserError where it is broken."""
    path = folder / IMAGES
    if not path.exists():
        return []
    records = read_json(path)
    if not isinstance(records, list):
        raise _broken(path, "it does not hold a list")
    try:
        json.dumps(records, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _broken(path, "a text in it is not valid Unicode") from None
    return [_image(path, number, record) for number, record in enumerate(records, start=1)]


def _image(path: Path, number: int, record: Any) -> GalleryImage:
    if not isinstance(record, dict):
        raise _broken(path, f"entry {number} is not an object")
    try:
        image = GalleryImage(**record)
    except TypeError:  # a field too many or too few
        names = ", ".join(field.name for field in fields(GalleryImage))
        raise _broken(path, f"entry {number} does not have the fields {names}") from None
    for name, kind in FIELD_TYPES.items():
        if not isinstance(getattr(image, name), kind):
            raise _broken(path, f"{name} of entry {number} is of the wrong kind")
    return image


def _broken(path: Path, reason: str) -> UserError:
    message = f"{path} is not a gallery's list of images: {reason}"
    return UserError(message, "Remove it or choose another --output_dir")


def write_gallery(folder: Path, images: list[GalleryImage], title: str) -> Path:
    """Write images.json and index.html into folder, each in one step; returns the page's path."""
    write_json(folder / IMAGES, [asdict(image) for image in images])
    write_text(folder / PAGE, _page(images, title))
    return folder / PAGE


def _page(images: list[GalleryImage], title: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True)  # fmt: skip
    # A file name is always a path below the page: "./" keeps "//host/x" from meaning anything else.
    environment.filters["href"] = lambda file: "./" + quote(file)
    source = (TEMPLATES / "gallery.html").read_text(encoding="utf-8")
    by_prompt: dict[str, list[GalleryImage]] = {}
    for image in images:
        by_prompt.setdefault(image.prompt, []).append(image)
    return environment.get_template("gallery.html").render(
        title=title, images=images, by_prompt=by_prompt, common=_common(images), all_settings=_all_settings,
        compared=any(image.base_file for image in images), tiny=all(image.width < 256 for image in images),
        policy=content_security_policy(source))  # fmt: skip


def _all_settings(image: GalleryImage) -> dict[str, str | int | float]:
    """What a person reads under an image, the seed left out: it stands beside it."""
    settings = {"size": f"{image.width}x{image.height}", **image.settings}
    if image.negative_prompt:
        settings["negative prompt"] = image.negative_prompt
    return settings


def _common(images: list[GalleryImage]) -> dict[str, str | int | float]:
    """The settings that every image shares, in the first one's order."""
    tables = [_all_settings(image) for image in images]
    return {name: value for name, value in (tables[0] if tables else {}).items()
            if all(name in table and table[name] == value for table in tables)}  # fmt: skip


def content_security_policy(source: str) -> str:
    """The policy of a template: its own style and script by the hash of their text, pictures from the disk.

    The hash is taken from the template and not from the finished page, so that markup which got in through a
    prompt could never be allowed by its own hash. The blocks therefore hold no jinja.
    """
    style, script = (_hash(source, tag) for tag in ("style", "script"))
    return (f"default-src 'none'; img-src 'self' file: data:; style-src '{style}'; script-src '{script}'; "
            "base-uri 'none'; form-action 'none'")  # fmt: skip


def _hash(source: str, tag: str) -> str:
    (block,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()

"""The page of results: images.json for programs and index.html for people, beside the images they
name."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import unicodedata
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.errors import UserError
from megaman.files import read_json, write_json, write_text
from megaman.pages.html import href, render

IMAGES, PAGE = "images.json", "index.html"
THUMBNAILS = "thumbnails"


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
    loras: list[str] = field(
        default_factory=list
    )  # as the command line names them, the strength behind a colon


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
}


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def read_images(folder: Path) -> list[GalleryImage]:
    """The images that folder/images.json names, none where it is missing; UserError where it is
    broken."""
    path = folder / IMAGES
    return [_image(path, number, record) for number, record in enumerate(_read(path)[1], start=1)]


def _read(path: Path) -> tuple[str, list[Any]]:
    """The gallery's id and its records; a new id where there is none yet: the first galleries were
    bare lists."""
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
    if not isinstance(record, dict):
        raise _broken(path, f"entry {number} is not an object")
    try:
        image = GalleryImage(**record)
    except TypeError:  # a field too many or too few
        names = ", ".join(field.name for field in fields(GalleryImage))
        raise _broken(path, f"entry {number} does not have the fields {names}") from None
    if name := schema.first_invalid(vars(image), CHECKS):
        raise _broken(path, f"{name} of entry {number} is of the wrong kind")
    return image


def _broken(path: Path, reason: str) -> UserError:
    message = f"{path} is not a gallery's list of images: {reason}"
    return UserError(message, "Remove it or choose another --output_dir")


def thumbnail_of(file: str) -> str:
    """Where the small copy of an image lies, relative to the gallery's folder, if there is one."""
    return f"{THUMBNAILS}/{file}.webp"


def write_gallery(folder: Path, images: list[GalleryImage], title: str) -> Path:
    """Write images.json and index.html into folder, each in one step; returns the page's path.

    The gallery keeps the id that its images.json has: under it a browser keeps the favourites.
    """
    gallery, _ = _read(folder / IMAGES)
    write_json(folder / IMAGES, {"gallery": gallery, "images": [asdict(image) for image in images]})
    write_text(folder / PAGE, _page(folder, images, title, gallery))
    return folder / PAGE


def _page(folder: Path, images: list[GalleryImage], title: str, gallery: str) -> str:
    labels = variant_labels(images)
    prompts = list(dict.fromkeys(image.prompt for image in images))
    places = {prompt: place for place, prompt in enumerate(prompts)}
    sections = [Section(prompt) for prompt in prompts]
    for number, image in enumerate(images):
        sections[places[image.prompt]].add(image.seed, labels[number], number)
    shown = [
        _shown(image, label, places[image.prompt])
        for image, label in zip(images, labels, strict=True)
    ]

    def small(file: str) -> str:
        return thumbnail_of(file) if os.path.isfile(folder / thumbnail_of(file)) else file

    return render(
        "gallery.html",
        {"href": href, "small": small},
        title=title,
        images=images,
        labels=labels,
        sections=sections,
        runs=_runs(sections),
        common=_common(shown),
        compared=any(image.base_file for image in images),
        tiny=all(image.width < 256 for image in images),
        data={"gallery": gallery, "prompts": prompts, "images": shown, "longest": LONGEST},
    )


class Section:
    """The images of one prompt, by their numbers: in a row, or in a table where one seed was drawn
    several ways."""

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.numbers: list[int] = []
        self._cells: dict[int, dict[str, list[int]]] = {}  # by seed and label

    def add(self, seed: int, label: str, number: int) -> None:
        self.numbers.append(number)
        self._cells.setdefault(seed, {}).setdefault(label, []).append(number)

    @property
    def columns(self) -> list[str]:
        """The labels in the order of drawing; none where nothing is compared."""
        if all(len(row) == 1 for row in self._cells.values()):
            return []
        return list(dict.fromkeys(label for row in self._cells.values() for label in row))

    @property
    def rows(self) -> list[tuple[int, list[list[int]]]]:
        """The seeds in the order of drawing, each with its images under each column."""
        return [
            (seed, [row.get(label, []) for label in self.columns])
            for seed, row in self._cells.items()
        ]


LONGEST = 60  # sections; full rows with 1 to 6 side by side


def _runs(sections: list[Section]) -> list[list[Section]]:
    """The sections in their order: those of one image and others apart, at most LONGEST
    together."""
    runs: list[list[Section]] = []
    for section in sections:
        single = len(section.numbers) == 1
        if not runs or len(runs[-1]) == LONGEST or single != (len(runs[-1][0].numbers) == 1):
            runs.append([])
        runs[-1].append(section)
    return runs


def variant_labels(images: list[GalleryImage]) -> list[str]:
    """What tells each image from another of its prompt and seed: the LoRA's name and strength, as
    far as they vary."""
    loras = [str(image.settings.get("LoRA", "")) for image in images]
    strengths = [str(image.settings.get("strength", "1")) for image in images]
    names = {lora: re.split(r"[/\\]", lora.rstrip("/\\"))[-1] for lora in loras}
    if len(set(names.values())) < len(names):  # two folders of one name
        names = {lora: lora for lora in loras}
    labels = []
    for lora, strength in zip(loras, strengths, strict=True):
        parts = [names[lora]] if len(names) > 1 else []
        parts += [f"strength {strength}"] if len(set(strengths)) > 1 else []
        labels.append(", ".join(parts))
    return labels


def _shown(image: GalleryImage, label: str, prompt: int) -> dict[str, Any]:
    """What the page's script knows of an image; numbers as text, since a browser would round a long
    seed."""
    return {
        "name": image.file,
        "file": href(image.file),
        "base": image.base_file and href(image.base_file),
        "prompt": prompt,
        "seed": str(image.seed),
        "label": label,
        "size": [image.width, image.height],
        "small": image.width < 256,
        "settings": _settings(image),
        "command": command(image),
    }


def _settings(image: GalleryImage) -> dict[str, str]:
    """What a person reads under an image, the seed left out: it stands beside it."""
    settings = {
        "size": f"{image.width}x{image.height}",
        **{name: str(value) for name, value in image.settings.items()},
    }
    if image.negative_prompt:
        settings["negative prompt"] = image.negative_prompt
    return settings


def _common(shown: list[dict[str, Any]]) -> dict[str, str]:
    """The settings that every image shares, in the first one's order."""
    first = shown[0]["settings"] if shown else {}
    return {
        name: value
        for name, value in first.items()
        if all(each["settings"].get(name) == value for each in shown)
    }


FLAGS = {
    "base": "--base_model",
    "strength": "--lora_scale",
    "steps": "--num_inference_steps",
    "guidance": "--guidance_scale",
    "sampler": "--scheduler",
    "clip skip": "--clip_skip",
}


def command(image: GalleryImage) -> str | None:
    """The line that draws the image again, for the shell of this system: sh, or PowerShell on
    Windows.

    None where a text holds a control character: what a shell makes of one that is pasted is
    anybody's guess.
    """
    values = {
        "--prompts": image.prompt,
        "--negative_prompt": image.negative_prompt,
        "--seed": image.seed,
        "--height": image.height,
        "--width": image.width,
        **{flag: image.settings[name] for name, flag in FLAGS.items() if name in image.settings},
    }
    loras = image.loras or [image.settings[name] for name in ["LoRA"] if name in image.settings]
    texts = list(map(str, [*values.values(), *loras]))
    if any(
        unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp") for text in texts for mark in text
    ):
        return None
    words = [f"{flag}={_quoted(str(value))}" for flag, value in values.items()]
    if len(loras) == 1:
        words.append(f"--lora_path={_quoted(str(loras[0]))}")
    elif loras:
        words[:0] = ["--lora_path", *(_quoted(str(lora)) for lora in loras)]
    return " ".join(["python generate_megaman.py", *words])


def _quoted(text: str) -> str:
    """A word for sh, or for PowerShell, which takes curly marks for straight ones."""
    if os.name == "nt":
        return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'"
    return shlex.quote(text)

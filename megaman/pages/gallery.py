"""The gallery next to generated images: images.json for programs and index.html for people."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.errors import UserError
from megaman.files import read_json, split_strength, write_json, write_text
from megaman.pages.html import href, render

IMAGES, PAGE = "images.json", "index.html"
THUMBNAILS = "thumbnails"
MAX_RUN = 60  # sections in a group: full rows with 1 to 6 side by side
GENERIC = re.compile(
    r"lora_weights|checkpoint-\d+"
    r"|(megaman_lora|pytorch_lora_weights|adapter_model)\.safetensors"
)
TINY = 256  # pixels of width below which images are enlarged


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
    _, records = _read(path)
    return [_image(path, number, record) for number, record in enumerate(records, start=1)]


def _read(path: Path) -> tuple[str, list[Any]]:
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


def title_of(images: Sequence[GalleryImage]) -> str:
    """The names of the LoRAs, for the page's title.

    A folder that training leaves has a name like all others, so its parent's stands for it.
    """
    names: dict[str, None] = {}
    for image in images:
        for lora in image.loras or [str(image.settings.get("LoRA", ""))]:
            path, _ = split_strength(lora)
            parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
            while len(parts) > 1 and GENERIC.fullmatch(parts[-1]):
                parts.pop()
            names |= dict.fromkeys(parts[-1:])
    shown = [name.removesuffix(".safetensors") for name in names][:3]
    return f"Images of {', '.join(shown)}" if shown else "Generated images"


def thumbnail_of(file: str) -> str:
    """The path of an image's smaller copy, which need not exist, relative to the gallery."""
    return f"{THUMBNAILS}/{file}.webp"


def write_gallery(folder: Path, images: list[GalleryImage], title: str) -> Path:
    """Write images.json and index.html into folder, each atomically; returns the page's path.

    The gallery keeps its id, under which a browser stores the favorites.
    """
    gallery, _ = _read(folder / IMAGES)
    write_json(folder / IMAGES, {"gallery": gallery, "images": [asdict(image) for image in images]})
    write_text(folder / PAGE, _page(folder, images, title, gallery))
    return folder / PAGE


def _page(folder: Path, images: list[GalleryImage], title: str, gallery: str) -> str:
    labels = variant_labels(images)
    prompts = list(dict.fromkeys(image.prompt for image in images))
    prompt_indices = {prompt: index for index, prompt in enumerate(prompts)}
    sections = _sections(images, labels)
    items = [
        _item(image, label, prompt_indices[image.prompt])
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
        common=_common_settings(items),
        compared=any(image.base_file for image in images),
        wide=any(image.base_file or image.pixel_file for image in images),
        tiny=all(image.width < TINY for image in images),
        data={"gallery": gallery, "prompts": prompts, "images": items, "longest": MAX_RUN},
    )


class Section:
    """The images of one prompt, by index: a row, or a table if a seed has several variants."""

    def __init__(self, prompt: str, entries: Sequence[tuple[int, int, str]]):
        """entries are the index, seed and label of each image."""
        self.prompt = prompt
        self.numbers = [index for index, _, _ in entries]
        self._cells: dict[int, dict[str, list[int]]] = {}  # by seed and label
        for index, seed, label in entries:
            self._cells.setdefault(seed, {}).setdefault(label, []).append(index)

    @property
    def columns(self) -> list[str]:
        """The labels in the order of the images; none if nothing is compared."""
        rows = self._cells.values()
        if all(len(row) == 1 for row in rows):
            return []
        return list(dict.fromkeys(chain.from_iterable(rows)))

    @property
    def rows(self) -> list[tuple[int, list[list[int]]]]:
        """The seeds in the order of the images, each with its images in each column."""
        return [
            (seed, [row.get(label, []) for label in self.columns])
            for seed, row in self._cells.items()
        ]


def _sections(images: list[GalleryImage], labels: list[str]) -> list[Section]:
    entries: dict[str, list[tuple[int, int, str]]] = {}
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        entries.setdefault(image.prompt, []).append((index, image.seed, label))
    return [Section(prompt, own) for prompt, own in entries.items()]


def _runs(sections: list[Section]) -> list[list[Section]]:
    """The sections in order, at most MAX_RUN in a group, and those with a single image apart."""
    runs: list[list[Section]] = []
    for _, group in groupby(sections, key=lambda section: len(section.numbers) == 1):
        members = list(group)
        runs += [members[start : start + MAX_RUN] for start in range(0, len(members), MAX_RUN)]
    return runs


def variant_labels(images: list[GalleryImage]) -> list[str]:
    """A label that distinguishes each image from others of its prompt and seed, "" if none can.

    It is the LoRA's name and strength, as far as they vary; "base" for an image without a LoRA
    among others with one.
    """
    loras = [str(image.settings.get("LoRA", "")) for image in images]
    strengths = [str(image.settings.get("strength", "1")) for image in images]
    names = _distinct_ends(set(loras))
    labels = []
    varied = {strength for lora, strength in zip(loras, strengths, strict=True) if lora}
    for lora, strength in zip(loras, strengths, strict=True):
        parts = [names[lora] or "base"] if len(names) > 1 else []
        if lora and len(varied) > 1:
            parts.append(f"strength {strength}")
        labels.append(", ".join(parts))
    return labels


def _distinct_ends(paths: set[str]) -> dict[str, str]:
    """The end of each path: its name, with as many folders before it as tell the paths apart."""
    parts = {path: re.split(r"[/\\]+", path.rstrip("/\\")) for path in paths}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {path: "/".join(each[-depth:]) for path, each in parts.items()}
        if len(set(ends.values())) == len(ends):
            return ends
    return {path: path for path in paths}


def _item(image: GalleryImage, label: str, prompt_index: int) -> dict[str, Any]:
    """An image for the page's script; the seed is text, since a browser would round a long one."""
    return {
        "name": image.file,
        "file": href(image.file),
        "base": image.base_file and href(image.base_file),
        "pixel": image.pixel_file and href(image.pixel_file),
        "prompt": prompt_index,
        "seed": str(image.seed),
        "label": label,
        "size": [image.width, image.height],
        "small": image.width < TINY,
        "settings": _settings(image),
        "nearest": _nearest(image.nearest),
        "command": command(image),
    }


def _nearest(nearest: NearestImage | None) -> dict[str, Any] | None:
    """The nearest training image for the page's script."""
    if nearest is None:
        return None
    return {
        "name": nearest.name,
        "distance": f"{nearest.distance:g}",
        "near": nearest.is_near,
        "preview": nearest.preview and href(nearest.preview),
    }


def _settings(image: GalleryImage) -> dict[str, str]:
    """The settings shown for an image, except the seed, which is next to it anyway."""
    settings = {"size": f"{image.width}x{image.height}"}
    settings |= {name: str(value) for name, value in image.settings.items()}
    if image.negative_prompt:
        settings["negative prompt"] = image.negative_prompt
    return settings


def _common_settings(items: list[dict[str, Any]]) -> dict[str, str]:
    """The settings that all images share, in the order of the first."""
    first = items[0]["settings"] if items else {}
    return {
        name: value
        for name, value in first.items()
        if all(item["settings"].get(name) == value for item in items)
    }


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
    words = [f"{flag}={_quoted(str(value))}" for flag, value in values.items()]
    if len(loras) == 1:
        words.append(f"--lora_path={_quoted(str(loras[0]))}")
    elif loras:
        words = ["--lora_path", *(_quoted(str(lora)) for lora in loras), *words]
    return " ".join(["python generate_megaman.py", *words])


def _has_control_character(text: str) -> bool:
    return any(unicodedata.category(character) in CONTROL_CHARACTERS for character in text)


def _quoted(text: str) -> str:
    """A word for sh, or for PowerShell, which takes curly quotation marks for straight ones."""
    if os.name == "nt":
        return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'"
    return shlex.quote(text)

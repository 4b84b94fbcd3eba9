"""The gallery next to generated images: images.json for programs and index.html for people."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from megaman.files import split_strength, write_json, write_text
from megaman.pages.gallery_command import command
from megaman.pages.gallery_images import IMAGES, GalleryImage, NearestImage, read_gallery
from megaman.pages.html import href, render

PAGE = "index.html"
THUMBNAILS = "thumbnails"
MAX_RUN = 60  # sections in a group: full rows with 1 to 6 side by side
GENERIC = re.compile(
    r"lora_weights|checkpoint-\d+"
    r"|(megaman_lora|pytorch_lora_weights|adapter_model)\.safetensors"
)
TINY = 256  # pixels of width below which images are enlarged


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
    gallery, _ = read_gallery(folder / IMAGES)
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

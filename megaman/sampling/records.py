"""What an image knows of itself: a JSON text in its PNG with all that draws it again, and what
follows from it.

A1111's parameters text and the gallery's entry are made of the same record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megaman import schema
from megaman.config import samplers
from megaman.errors import UserError
from megaman.files import is_network, replacing
from megaman.pages.gallery import GalleryImage, thumbnail_of
from megaman.sampling.jobs import Job, Way
from megaman.threads import MAX_THREADS

KEY = "megaman"  # of the PNG's text chunk
MOST = 4096  # images in a batch, LoRAs and parts of a version that a stranger's record may name
LONGEST = 100_000  # characters of a prompt


def a1111_text(prompt: str, negative_prompt: str, values: dict[str, Any]) -> str:
    """A1111's text: the prompt, the negative prompt, then one line of "Name: value" pairs.

    A value with a comma, a colon, a quote or a line break in it becomes a JSON string, as A1111
    writes and reads it.
    """
    pairs = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    return f"{prompt}\n{negative}{pairs}"


def _quoted(value: str) -> str:
    return (
        json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value
    )


THUMBNAIL = 256  # pixels of the longer side


def save_thumbnail(path: Path, image: Image.Image) -> None:
    """Write a small WebP for the gallery where the image is much larger: a browser keeps what it
    has decoded."""
    if max(image.size) > 1.2 * THUMBNAIL:
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
    """Write the image with its parameters text and other texts by their keys, whole or not at
    all."""
    info = PngInfo()
    for key, text in {"parameters": parameters, **others}.items():
        info.add_itxt(key, text)
    with replacing(path) as aside:
        image.save(aside, format="PNG", pnginfo=info)


@dataclass(frozen=True)
class Record:
    """All that an image's pixels hang on.

    loras are (path, strength, hash), lora_scale a factor on all strengths; batch are the images
    drawn together, each as (prompt, negative prompt, seed), of which this is number place.
    """

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    clip_skip: int
    base: str
    loras: list[list[Any]]
    lora_scale: float
    batch: list[list[Any]]
    place: int
    device: str
    dtype: str
    fused: bool
    vae_tiling: bool
    versions: dict[str, str]
    memory_format: str = "contiguous"  # earlier records do not tell
    threads: int = 0  # CPU threads of torch; 0: earlier records do not tell

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the user chose, whatever it was drawn together with and on."""
        loras = tuple(map(tuple, self.loras))
        return (
            self.prompt,
            self.negative_prompt,
            self.seed,
            self.width,
            self.height,
            self.steps,
            self.guidance_scale,
            self.scheduler,
            self.clip_skip,
            self.base,
            loras,
            self.lora_scale if loras else 1.0,
        )

    def jobs(self) -> list[Job]:
        """The images of its batch, as they were drawn together."""
        return [
            Job(
                0,
                place,
                prompt,
                negative_prompt,
                seed,
                self.width,
                self.height,
                self.steps,
                self.guidance_scale,
            )
            for place, (prompt, negative_prompt, seed) in enumerate(self.batch)
        ]


def make(
    job: Job,
    batch: Sequence[Job],
    way: Way,
    hashes: Mapping[Path, str],
    shared: Mapping[str, Any],
    base: bool = False,
) -> Record:
    """The record of one job of a batch; shared are the fields that the whole run has in common.

    With base it is that of the image beside it, drawn without any LoRA.
    """
    loras = (
        []
        if base
        else [[path.as_posix(), strength, hashes[path]] for _, path, strength in way.loras]
    )
    return Record(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        width=job.width,
        height=job.height,
        steps=job.steps,
        guidance_scale=job.guidance,
        loras=loras,
        lora_scale=1.0 if base else way.scale,
        batch=[[each.prompt, each.negative_prompt, each.seed] for each in batch],
        place=batch.index(job),
        **shared,
    )


def save(path: Path, image: Image.Image, record: Record) -> None:
    """Write the image with its record, A1111's parameters text and, where it is large, a
    thumbnail."""
    save_png(
        path, image, parameters_text(record), {KEY: json.dumps(asdict(record), ensure_ascii=False)}
    )
    save_thumbnail(path.parent / thumbnail_of(path.name), image)


def parameters_text(record: Record) -> str:
    """A1111's text, with LoRAs told as it tells them: in the prompt, and their hashes below."""
    named = [
        (short_name(path), strength * record.lora_scale, digest)
        for path, strength, digest in record.loras
    ]
    tags = [f"<lora:{name}:{strength:g}>" for name, strength, _ in named if strength]
    values = {
        "Steps": record.steps,
        "Sampler": samplers.find(record.scheduler).title,
        "CFG scale": f"{record.guidance_scale:g}",
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model": Path(record.base).name.removesuffix(".safetensors"),
        "RNG": "CPU",
    }
    if record.clip_skip > 1:
        values["Clip skip"] = record.clip_skip
    if tags:
        values["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, _, digest in named)
    return a1111_text(" ".join([record.prompt, *tags]), record.negative_prompt, values)


def short_name(lora: str) -> str:
    """What A1111 would call the LoRA: the file's name, and for a folder of ours that of its kohya
    file."""
    return Path(lora).stem if lora.lower().endswith(".safetensors") else "megaman_lora"


def gallery_image(file: str, record: Record, base_file: str | None = None) -> GalleryImage:
    """The image's entry on the page."""
    loras = [
        path if len(record.loras) == 1 else f"{path}:{strength:g}"
        for path, strength, _ in record.loras
    ]
    strength = (
        record.loras[0][1] * record.lora_scale if len(record.loras) == 1 else record.lora_scale
    )
    settings = (
        {
            "steps": record.steps,
            "guidance": record.guidance_scale,
            "sampler": samplers.find(record.scheduler).title,
        }
        | ({"clip skip": record.clip_skip} if record.clip_skip > 1 else {})
        | ({"LoRA": ", ".join(loras), "strength": f"{strength:g}"} if loras else {})
        | {"base": record.base}
    )
    return GalleryImage(
        file,
        record.prompt,
        record.negative_prompt,
        record.seed,
        record.width,
        record.height,
        settings,
        base_file,
        loras,
    )


def in_image(path: Path) -> Record | None:
    """The record in an image, None where there is none or where it is damaged."""
    try:
        return read(path)
    except UserError:
        return None


def read(path: Path) -> Record:
    """The record in an image, which may be a stranger's; raises UserError where it is none of this
    project's."""
    another = "Name an image that generate_megaman.py drew"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(KEY)
    except FileNotFoundError:
        raise UserError(f"--from_image {path} is missing", another) from None
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"--from_image {path} is no PNG that can be read", another) from None
    if text is None:
        raise UserError(f"--from_image {path} carries no record of this project", another)
    try:
        content = {"memory_format": Record.memory_format, "threads": Record.threads} | json.loads(
            text
        )
        known = {field.name: content[field.name] for field in fields(Record)}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"--from_image {path}: its record is damaged", another) from None
    if wrong := schema.first_invalid(known, CHECKS):
        raise UserError(
            f"--from_image {path}: {wrong} in its record is not what it can be", another
        )
    record = Record(**known)
    if not record.place < len(record.batch):
        raise UserError(f"--from_image {path}: place in its record is not what it can be", another)
    return record


def _is_side(value: Any) -> bool:
    return schema.whole(8, 8192)(value) and value % 8 == 0


def _is_path(value: Any) -> bool:
    return _is_text(value) and bool(value) and not is_network(value)


def _is_sampler(value: Any) -> bool:
    return _is_text(value) and samplers.find(value) is not None


_is_text = schema.text(LONGEST)
_is_seed = schema.whole(0, 2**64 - 1)
_is_strength = schema.number(-10, 10)
# The limits are those of the command line; a path that would log in elsewhere is none. Whether base
# and LoRAs are still there is checked when they are loaded: they may have moved.
CHECKS = {
    "prompt": _is_text, "negative_prompt": _is_text, "seed": _is_seed, "width": _is_side, "height": _is_side,
    "steps": schema.whole(1, 999), "guidance_scale": schema.number(0, 100), "scheduler": _is_sampler,
    "clip_skip": schema.whole(1, 64), "base": _is_path,
    "loras": schema.list_of(schema.row(_is_path, _is_strength, _is_text), most=MOST), "lora_scale": _is_strength,
    "batch": schema.list_of(schema.row(_is_text, _is_text, _is_seed), least=1, most=MOST),
    "place": schema.whole(0, MOST), "device": _is_text, "dtype": schema.one_of("float32", "float16", "bfloat16"),
    "fused": schema.instance(bool), "vae_tiling": schema.instance(bool), "versions": schema.mapping(_is_text),
    "memory_format": schema.one_of("contiguous", "channels_last"), "threads": schema.whole(0, MAX_THREADS),
}  # fmt: skip

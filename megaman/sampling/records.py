"""What an image knows about itself: a record in its PNG with everything that `--from_image` needs.

A1111's parameters text and the gallery's entry are made from the same record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megaman.config import samplers
from megaman.pages.gallery import thumbnail_of
from megaman.pages.gallery_images import GalleryImage
from megaman.sampling.jobs import Job, LoraVariant
from megaman.sampling.png import a1111_text, needs_thumbnail, save_png, save_thumbnail

KEY = "megaman"  # of the PNG's text chunk


@dataclass(frozen=True)
class RunSettings:
    """The fields of a Record that all images of a run share."""

    scheduler: str
    clip_skip: int
    base: str
    fused: bool
    device: str
    dtype: str
    versions: dict[str, str]
    memory_format: str
    threads: int
    pixel_art: int = 0
    palette: list[str] | None = None


@dataclass(frozen=True)
class Record:
    """Everything that an image's pixels depend on.

    loras are (absolute path, strength, hash), lora_scale multiplies all strengths; batch are the
    images generated together, each as (prompt, negative prompt, seed), and place is this one's
    index. pixel_art is the number of cells of the pixel art next to it, 0 for none, and palette its
    colors as rrggbb.
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
    memory_format: str = "contiguous"  # earlier records lack it
    threads: int = 0  # CPU threads of torch; 0: earlier records lack it
    vae_tile: int = 0  # pixels a side; 0 with vae_tiling: an earlier record, the VAE's own tile
    pixel_art: int = 0
    palette: list[str] | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the user chose, whatever the image was generated with and on.

        A LoRA counts by its hash: it may be named in many ways, and may have moved.
        """
        loras = tuple((strength, digest) for _, strength, digest in self.loras)
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
        """The jobs of its batch, as they were generated together."""
        return [
            Job(
                prompt_index=0,
                image_index=place,
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=seed,
                width=self.width,
                height=self.height,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
            )
            for place, (prompt, negative_prompt, seed) in enumerate(self.batch)
        ]


@dataclass(frozen=True)
class Recorder:
    """Makes the records of a run; hashes are those of its LoRAs."""

    run: RunSettings
    hashes: Mapping[Path, str]

    def record(
        self,
        job: Job,
        batch: Sequence[Job],
        variant: LoraVariant,
        vae_tile: int = 0,
        without_lora: bool = False,
    ) -> Record:
        """The record of a job's image, or with without_lora of the base's image next to it."""
        loras: list[list[Any]] = []
        if not without_lora:
            for _, path, strength in variant.loras:
                # Not resolved: on Windows that leads from a drive's letter to another machine.
                absolute = Path(os.path.abspath(path)).as_posix()
                loras.append([absolute, strength, self.hashes[path]])
        return Record(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            seed=job.seed,
            width=job.width,
            height=job.height,
            steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            loras=loras,
            lora_scale=1.0 if without_lora else variant.scale,
            batch=[[each.prompt, each.negative_prompt, each.seed] for each in batch],
            place=batch.index(job),
            vae_tiling=vae_tile > 0,
            vae_tile=vae_tile,
            **vars(self.run),
        )


def save(path: Path, image: Image.Image, record: Record) -> None:
    """Write the image with its record and A1111's parameters text, and a thumbnail if it is
    large."""
    text = json.dumps(asdict(record), ensure_ascii=False)
    save_png(path, image, parameters_text(record), {KEY: text})
    save_thumbnail(path.parent / thumbnail_of(path.name), image)


def restore_thumbnail(path: Path, record: Record) -> None:
    """Write the thumbnail of a saved image again if it needs one that is missing or damaged."""
    thumbnail = path.parent / thumbnail_of(path.name)
    if not needs_thumbnail((record.width, record.height)):
        return
    try:
        with Image.open(thumbnail) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        with Image.open(path, formats=["PNG"]) as image:
            save_thumbnail(thumbnail, image)


def parameters_text(record: Record) -> str:
    """A1111's text, with LoRAs as A1111 names them: in the prompt, and their hashes below."""
    tags, hashes = [], []
    for path, strength, digest in record.loras:
        name = short_name(path)
        hashes.append(f"{name}: {digest}")
        if scaled := strength * record.lora_scale:
            tags.append(f"<lora:{name}:{scaled:g}>")
    job = record.jobs()[record.place]
    values = a1111_values(job, samplers.by_name(record.scheduler), record.base)
    if record.clip_skip > 1:
        values["Clip skip"] = record.clip_skip
    if tags:
        values["Lora hashes"] = ", ".join(hashes)
    return a1111_text(" ".join([record.prompt, *tags]), record.negative_prompt, values)


def a1111_values(job: Job, sampler: samplers.Sampler, base: str) -> dict[str, Any]:
    """A job's settings under A1111's names, without its prompts."""
    return {
        "Steps": job.num_inference_steps,
        "Sampler": sampler.title,
        "CFG scale": f"{job.guidance_scale:g}",
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model": Path(base).name.removesuffix(".safetensors"),
        "RNG": "CPU",
    }


def short_name(lora: str) -> str:
    """A1111's name of a LoRA: that of the file, and of the kohya file for a folder of ours."""
    return Path(lora).stem if lora.lower().endswith(".safetensors") else "megaman_lora"


def gallery_image(
    file: str, record: Record, base_file: str | None = None, pixel_file: str | None = None
) -> GalleryImage:
    """The image's entry on the page."""
    settings: dict[str, str | int | float] = {
        "steps": record.steps,
        "guidance": record.guidance_scale,
        "sampler": samplers.by_name(record.scheduler).title,
    }
    if record.clip_skip > 1:
        settings["clip skip"] = record.clip_skip
    loras = []
    if len(record.loras) == 1:
        ((path, strength, _),) = record.loras
        loras = [path]
        settings["LoRA"] = path
        settings["strength"] = f"{strength * record.lora_scale:g}"
    elif record.loras:
        loras = [f"{path}:{strength:g}" for path, strength, _ in record.loras]
        settings["LoRA"] = ", ".join(loras)
        settings["strength"] = f"{record.lora_scale:g}"
    settings["base"] = record.base
    if record.pixel_art:
        colors = f", {len(record.palette)} colors" if record.palette else ""
        settings["pixel art"] = f"{record.pixel_art} cells{colors}"
    return GalleryImage(
        file=file,
        prompt=record.prompt,
        negative_prompt=record.negative_prompt,
        seed=record.seed,
        width=record.width,
        height=record.height,
        settings=settings,
        base_file=base_file,
        loras=loras,
        pixel_file=pixel_file,
    )

"""What to generate: one job an image, batches of jobs, and the LoRA variants that all jobs run
with."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

from megaman.files import safe_name
from megaman.sampling.prompts import Prompt, PromptSettings

MAX_STEM = 40  # characters of a name to which a number is added: safe_name cuts the end off


@dataclass(frozen=True)
class Job:
    """One image: prompt_index counts the prompts, image_index the images of a prompt, both from 0.

    width and height are in pixels.
    """

    prompt_index: int
    image_index: int
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class LoraVariant:
    """The LoRAs of one variant as (index, path, strength), and a scale that multiplies them all.

    label has the parts of a file name that tell this variant from the others.
    """

    loras: tuple[tuple[int, Path, float], ...]
    scale: float
    label: tuple[str, ...] = ()

    @property
    def scales(self) -> dict[int, float]:
        """The factor on each LoRA's trained scale, by its index."""
        return {index: strength * self.scale for index, _, strength in self.loras}


@dataclass(frozen=True)
class PendingBatch:
    """A batch to generate, and those of its jobs whose images, or whose images of the base alone,
    are to be saved.

    It is always generated whole, so that its pixels stay the same.
    """

    variant: LoraVariant
    batch: Sequence[Job]
    missing: Sequence[Job]
    missing_base: Sequence[Job] = ()

    def jobs_to_save(self, without_lora: bool) -> Sequence[Job]:
        """The jobs that lack their image, or with without_lora the base's image next to it."""
        return self.missing_base if without_lora else self.missing


def count_images(pending: Sequence[PendingBatch]) -> int:
    """How many images these batches generate, those of the base included."""
    images = sum(len(item.batch) for item in pending if item.missing)
    return images + sum(len(item.batch) for item in pending if item.missing_base)


def make_jobs(
    prompts: Sequence[Prompt], defaults: PromptSettings, num_images_per_prompt: int
) -> list[Job]:
    """The jobs of all prompts; image j of a prompt uses seed + j."""
    jobs = []
    for prompt_index, prompt in enumerate(prompts):
        settings = prompt.settings(defaults)
        for image_index in range(num_images_per_prompt):
            job = Job(
                prompt_index=prompt_index,
                image_index=image_index,
                prompt=prompt.text,
                negative_prompt=settings.negative_prompt,
                seed=settings.seed + image_index,
                width=settings.width,
                height=settings.height,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
            )
            jobs.append(job)
    return jobs


def make_variants(
    loras: Sequence[tuple[Path, float]], scales: Sequence[float], one_by_one: bool
) -> list[LoraVariant]:
    """All the LoRAs together, or one by one, each time at every scale."""
    names = distinct_names([path for path, _ in loras])
    indexed = [(index, path, strength) for index, (path, strength) in enumerate(loras)]
    groups = [(lora,) for lora in indexed] if one_by_one else [tuple(indexed)]
    variants = []
    for group, scale in product(groups, scales):
        label = [names[index] for index, _, _ in group] if one_by_one else []
        if len(scales) > 1:
            label.append(f"{scale:g}")
        variants.append(LoraVariant(group, scale, tuple(label)))
    return variants


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The paths' names, with as many of their folders as distinguish them; with a number if nothing
    does. Files of these names are distinct on every system: some take a and A for the same."""
    plain = [path.with_suffix("") if path.suffix == ".safetensors" else path for path in paths]
    for depth in range(1, 1 + max((len(path.parts) for path in plain), default=0)):
        names = ["_".join(path.parts[-depth:]) for path in plain]
        files = {unicodedata.normalize("NFC", safe_name(name)).casefold() for name in names}
        if len(files) == len(names):
            return names
    return [f"{path.name[:MAX_STEM]}_{number}" for number, path in enumerate(plain, start=1)]


def make_batches(
    jobs: Sequence[Job], batch_size: Callable[[Job], int], extra_key: Callable[[Job], Hashable]
) -> list[list[Job]]:
    """The jobs in their order, in batches of at most batch_size(job) images.

    Only neighbors with the same size, steps, guidance scale and extra_key share a batch.
    """

    def key(job: Job) -> Hashable:
        steps, guidance_scale = job.num_inference_steps, job.guidance_scale
        return job.width, job.height, steps, guidance_scale, extra_key(job)

    batches = []
    for _, group in groupby(jobs, key=key):
        alike = list(group)
        size = batch_size(alike[0])
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return batches


def share_out(pending: Sequence[PendingBatch], count: int) -> list[list[PendingBatch]]:
    """The batches in count lists of about equal work, one a process, each of neighbors.

    So each process generates with few variants, and all lists together are in order. If there are
    fewer batches than lists, the last lists are empty.
    """
    shares: list[list[PendingBatch]] = [[] for _ in range(count)]
    whole, before = sum(_work(item) for item in pending), 0
    for item in pending:
        middle = before + _work(item) / 2
        shares[int(middle / whole * count)].append(item)
        before += _work(item)
    return sorted(shares, key=lambda share: not share)


def _work(item: PendingBatch) -> int:
    """In pixels times steps."""
    first = item.batch[0]
    times = bool(item.missing) + bool(item.missing_base)
    return times * len(item.batch) * first.width * first.height * first.num_inference_steps


def image_file(job: Job, variant: LoraVariant, first: int) -> str:
    """The image's file name, in a folder in which this run's first prompt has the number first."""
    number = f"megaman_{first + job.prompt_index:03d}_{job.image_index:02d}"
    return "_".join([number, *map(safe_name, variant.label)]) + ".png"


def pixel_image_file(file: str) -> str:
    """The name of the same image as pixel art, which lies next to it."""
    return file.removesuffix(".png") + "_pixel.png"


def base_image_file(file: str) -> str:
    """The name of the same image without a LoRA, which lies next to it."""
    return file.removesuffix(".png") + "_base.png"

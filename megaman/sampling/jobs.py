"""What is to be drawn: one job an image, batches of jobs, and the ways (LoRAs and strengths) in
which all are drawn."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import TypeVar

from megaman.files import safe_name
from megaman.sampling.prompts import Prompt

Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """Image number j of prompt number i, both from 0; width and height in pixels."""

    i: int
    j: int
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Way:
    """One way to draw a job: the LoRAs at work by their numbers, each one's own strength, a factor
    on all of them.

    label has the parts that tell the file from that of another way.
    """

    loras: tuple[tuple[int, Path, float], ...]
    scale: float
    label: tuple[str, ...] = ()

    @property
    def strengths(self) -> dict[int, float]:
        """What each LoRA is multiplied by, by its number."""
        return {number: strength * self.scale for number, _, strength in self.loras}


def make_jobs(
    prompts: Sequence[Prompt],
    count: int,
    negative_prompt: str,
    seed: int,
    size: tuple[int, int],
    steps: int,
    guidance: float,
) -> list[Job]:
    """count images of each prompt, image j with seed + j; size is (width, height). A prompt's own
    settings win."""

    def or_own(own: Item | None, general: Item) -> Item:
        return general if own is None else own

    return [
        Job(
            i,
            j,
            prompt.text,
            or_own(prompt.negative, negative_prompt),
            or_own(prompt.seed, seed) + j,
            or_own(prompt.width, size[0]),
            or_own(prompt.height, size[1]),
            or_own(prompt.steps, steps),
            or_own(prompt.guidance, guidance),
        )
        for (i, prompt), j in product(enumerate(prompts), range(count))
    ]


def make_ways(
    loras: Sequence[tuple[Path, float]], scales: Sequence[float], one_by_one: bool
) -> list[Way]:
    """All the LoRAs together, or one by one, each time at every scale of their own strengths."""
    numbered = [(number, *lora) for number, lora in enumerate(loras)]
    groups = [(lora,) for lora in numbered] if one_by_one else [tuple(numbered)]
    return [
        Way(
            group,
            scale,
            tuple(path.name for _, path, _ in group) * one_by_one
            + (f"{scale:g}",) * (len(scales) > 1),
        )
        for group, scale in product(groups, scales)
    ]


def in_batches(
    jobs: Sequence[Job], size: Callable[[Job], int], alike: Callable[[Job], Hashable]
) -> list[list[Job]]:
    """The jobs in their order, cut into batches of at most size; only neighbours that are alike go
    together."""
    batches = []
    for _, group in groupby(
        jobs, key=lambda job: (job.width, job.height, job.steps, job.guidance, alike(job))
    ):
        row = list(group)
        at_once = size(row[0])
        batches += [row[start : start + at_once] for start in range(0, len(row), at_once)]
    return batches


def file_of(job: Job, way: Way, first: int) -> str:
    """The image's name in a folder in which this run's first prompt has the number first."""
    return (
        "_".join([f"megaman_{first + job.i:03d}_{job.j:02d}", *map(safe_name, way.label)]) + ".png"
    )


def base_file_of(file: str) -> str:
    """Where the same image without the LoRA stands beside it."""
    return file.removesuffix(".png") + "_base.png"

"""The dataset doctor: what is wrong with a folder of pictures and captions, as data. No model, no
torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megaman.data.captions import trigger_words
from megaman.doctor.caption_checks import captions, counted, metadata, tags, terms, triggers
from megaman.doctor.duplicates import Pair, near_duplicates
from megaman.doctor.findings import Finding, Picture, relative, several
from megaman.doctor.image_stats import SMALL, Appearance, appearances

if TYPE_CHECKING:
    from megaman.data.buckets import Buckets
    from megaman.data.dataset import MegaManDataset

BLURRED = 0.26  # sharpness below which no edge is narrower than about four pixels
TINY = 2  # enlarged so often, nothing of the training size is in a picture
SHAPES = {
    "1:3": 1 / 3,
    "1:2": 1 / 2,
    "9:16": 9 / 16,
    "2:3": 2 / 3,
    "3:4": 3 / 4,
    "4:5": 4 / 5,
    "1:1": 1,
    "5:4": 5 / 4,
    "4:3": 4 / 3,
    "3:2": 3 / 2,
    "16:9": 16 / 9,
    "2:1": 2,
    "3:1": 3,
}


@dataclass(frozen=True)
class Report:
    """All that the doctor found. terms counts tags, or words where the captions are sentences (term
    says which)."""

    data_dir: Path
    resolution: int
    trigger: str
    pictures: list[Picture]
    findings: list[Finding]
    term: str
    terms: Counter[str]
    shapes: dict[str, int]
    buckets: dict[
        str, int
    ]  # pictures by the bucket they go to, such as 448x576; empty where all are cut to squares

    @property
    def readable(self) -> list[Picture]:
        """The pictures that could be looked at."""
        return [picture for picture in self.pictures if picture.width]

    @property
    def wrong(self) -> bool:
        return any(finding.wrong for finding in self.findings)


def examine(
    dataset: MegaManDataset,
    resolution: int,
    trigger: str | None = None,
    progress: Callable[[Iterable[Appearance]], Iterable[Appearance]] = iter,
) -> Report:
    """Look at every picture and caption of a dataset, headers checked or not.

    resolution is the training size in pixels, trigger the words that every caption should hold
    (None: those that the captions agree on, if they do). progress may wrap the pictures on their
    way, to show a bar.
    """
    unread = dict(dataset.skipped)
    pictures: list[Picture] = []
    remarks: dict[str, tuple[Path, str]] = {}
    small: list[np.ndarray] = []
    # An image that is repeated is not a duplicate of itself.
    once = {example.image: example for example in dataset.examples}
    seen = progress(appearances(list(once), resolution))
    for (file, example), look in zip(once.items(), seen, strict=True):
        if look.problem is not None:
            unread[file] = look.problem
            continue
        path = relative(file, dataset.data_dir)
        pictures.append(
            Picture(
                path,
                file,
                example.caption,
                example.caption_from_file,
                look.width,
                look.height,
                look.sharpness,
                look.preview,
            )
        )
        small.append(look.small)
        if example.caption_warning:
            remarks[path] = example.caption_warning
    bad = [Picture(relative(file, dataset.data_dir), file) for file in unread]
    reasons = {picture.path: reason for picture, reason in zip(bad, unread.values(), strict=True)}
    written = [picture.caption for picture in pictures if picture.found]
    if inferred := trigger is None:
        trigger = trigger_words(written)
    term, of_each = terms(written)
    findings = [
        *unreadable(reasons),
        *sizes(pictures, resolution, squares=dataset.buckets is None),
        *blurred(pictures),
        *duplicates(
            pictures, np.stack(small) if small else np.empty((0, SMALL, SMALL, 3), np.uint8)
        ),
        *captions(pictures, remarks, dataset.data_dir),
        *metadata(dataset.metadata_warnings, dataset.data_dir),
        *triggers(pictures, trigger, inferred),
        *tags(pictures, term, of_each, trigger),
    ]
    findings.sort(key=lambda finding: not finding.wrong)
    by_path = {picture.path: picture for picture in [*bad, *pictures]}
    for finding in findings:
        for path in finding.files:
            by_path[path].kinds.append(finding.kind)
    shapes = Counter(shape(picture.width, picture.height) for picture in pictures)
    return Report(
        dataset.data_dir,
        resolution,
        trigger,
        [*bad, *pictures],
        findings,
        term,
        counted(of_each),
        {name: shapes[name] for name in SHAPES if shapes[name]},
        in_buckets(pictures, dataset.buckets),
    )


def in_buckets(pictures: Sequence[Picture], buckets: Buckets | None) -> dict[str, int]:
    """How many pictures go to each bucket, from tall to wide."""
    sizes = Counter(
        buckets.size_for(picture.width, picture.height) for picture in pictures if buckets
    )
    return {f"{w}x{h}": sizes[w, h] for w, h in sorted(sizes, key=lambda size: size[0] / size[1])}


def shape(width: int, height: int) -> str:
    """The nearest of the usual aspect ratios, by the factor between them."""
    return min(
        SHAPES, key=lambda name: max(SHAPES[name] * height / width, width / height / SHAPES[name])
    )


def unreadable(reasons: dict[str, str]) -> Iterator[Finding]:
    if reasons:
        title = f"{several(len(reasons), 'picture')} cannot be used"
        yield Finding(
            "unreadable",
            True,
            title,
            "The report says why of each; mend or remove them: a training leaves them out",
            list(reasons),
            reasons,
        )


def sizes(pictures: Sequence[Picture], resolution: int, squares: bool) -> Iterator[Finding]:
    """Pictures that have to be enlarged, and, where all are cut to squares, those of which a square
    shows little."""
    short = {picture.path: min(picture.width, picture.height) for picture in pictures}
    measures = {picture.path: f"{picture.width}x{picture.height}" for picture in pictures}
    tiny = [path for path, side in short.items() if side * TINY <= resolution]
    small = [path for path, side in short.items() if side < resolution < side * TINY]
    if tiny:
        title = (
            f"{several(len(tiny), 'picture')} at most half as large as --resolution {resolution}"
        )
        if len(tiny) == len(pictures):
            title = f"all {title}"
        yield Finding(
            "tiny",
            True,
            title,
            "Find larger ones, lower --resolution, or remove them: enlarged they teach blur",
            tiny,
            measures,
        )
    if small:
        yield Finding(
            "small",
            False,
            f"{several(len(small), 'picture')} smaller than --resolution {resolution}",
            "They are enlarged a little; larger ones would be sharper",
            small,
            measures,
        )
    long = [p.path for p in pictures if max(p.width, p.height) * 2 > 3 * min(p.width, p.height)]
    if long and squares:
        yield Finding(
            "long",
            False,
            f"{several(len(long), 'picture')} far from square",
            "A square shows less than two thirds of them: train with --enable_bucket, or crop them yourself",
            long,
            measures,
        )


def blurred(pictures: Sequence[Picture]) -> Iterator[Finding]:
    soft = [
        picture.path
        for picture in pictures
        if picture.sharpness is not None and picture.sharpness < BLURRED
    ]
    if soft:
        details = {
            p.path: f"sharpness {p.sharpness:.2f}, sharp from {BLURRED}"
            for p in pictures
            if p.sharpness
        }
        yield Finding(
            "blurred",
            True,
            f"{several(len(soft), 'picture')} blurred",
            "Take the original in its full size, or remove them: a LoRA learns the blur too",
            soft,
            details,
        )


def duplicates(pictures: Sequence[Picture], small: np.ndarray) -> Iterator[Finding]:
    """Near-duplicates among the pictures; small as of near_duplicates, in the same order."""
    pairs = near_duplicates(small)
    if pairs:
        named = [
            (pictures[p.first].path, pictures[p.second].path, difference(p, pictures))
            for p in pairs
        ]
        paths = list(dict.fromkeys(path for one, other, _ in named for path in (one, other)))
        details = {picture.path: f"{picture.width}x{picture.height}" for picture in pictures}
        details |= {other: f"{details[other]}, {how}" for _, other, how in named}
        yield Finding(
            "duplicates",
            True,
            f"{several(len(paths), 'picture')} nearly the same as another",
            "Keep the best of each group: what is there twice is learned twice as hard",
            paths,
            details,
            named,
        )


def difference(pair: Pair, pictures: Sequence[Picture]) -> str:
    """How two near-duplicates differ, in a word or two."""
    one, other = pictures[pair.first], pictures[pair.second]
    words = ["mirrored"] * pair.mirrored + ["cropped"] * pair.cropped
    if not pair.cropped and (one.width, one.height) != (other.width, other.height):
        words.append("resized")
    return ", ".join(words) or "the same picture"

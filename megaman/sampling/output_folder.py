"""What an output folder holds already: images no page names yet, numbers that are taken, what a
stopped run drew."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megaman.errors import UserError
from megaman.pages.gallery import GalleryImage
from megaman.sampling import records
from megaman.sampling.jobs import base_file_of

NUMBERED = re.compile(r"megaman_(\d+)_\d+.*\.png")


def complete(folder: Path, images: list[GalleryImage]) -> list[GalleryImage]:
    """The gallery's images, and those that were saved as a run was killed before the page could
    name them."""
    known = {file for image in images for file in (image.file, image.base_file)}
    found = []
    for path in sorted(folder.glob("megaman_*.png")):
        base = path.with_name(base_file_of(path.name))
        is_half = path.name.endswith("_base.png")  # its image was not drawn yet
        if path.name not in known and not is_half and (record := records.in_image(path)):
            found.append(
                records.gallery_image(path.name, record, base.name if base.is_file() else None)
            )
    return [*images, *found]


def first_free(folder: Path) -> int:
    """The first prompt number that no image in the folder has: what is there stays, new images come
    after it."""
    taken = [
        int(match[1])
        for path in folder.glob("megaman_*.png")
        if (match := NUMBERED.fullmatch(path.name))
    ]
    return max(taken, default=-1) + 1


def first_of_stopped(folder: Path, wanted: Sequence[tuple[int, records.Record]]) -> int | None:
    """The number that the first prompt had in the run that was stopped, None where nothing of it is
    there.

    wanted are the numbers of the prompts with the records that their images would have.
    """
    prompts: dict[tuple, list[int]] = {}
    for i, record in wanted:
        prompts.setdefault(record.identity, []).append(i)
    votes: Counter[int] = Counter()
    for path in folder.glob("megaman_*.png"):
        match = NUMBERED.fullmatch(path.name)
        if match and not path.name.endswith("_base.png") and (record := records.in_image(path)):
            votes.update(
                {int(match[1]) - i for i in prompts.get(record.identity, []) if i <= int(match[1])}
            )
    return max(votes, key=lambda first: (votes[first], first)) if votes else None


def is_there(path: Path, record: records.Record) -> bool:
    """Whether the image is drawn already; raises UserError where another one has its name."""
    if not path.exists():
        return False
    found = records.in_image(path)
    if found is None or found.identity != record.identity:
        raise UserError(
            f"--resume: {path} is another image than this command draws",
            "Give the same flags, or leave --resume out",
        )
    return True


def refuse_taken(path: Path) -> None:
    """Raise UserError where an image has this name by now: it was free as the run began, so another
    run draws here."""
    if path.exists():
        raise UserError(
            f"{path} was drawn by another run in the meantime",
            "Give each run an --output_dir of its own",
        )

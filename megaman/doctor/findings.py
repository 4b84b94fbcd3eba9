"""What the dataset doctor finds, as data: images and findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class CheckedImage:
    """One file and what was found out about it.

    Args:
        path: relative to the data folder, as Unicode (`relative_name`).
        file: the real path.
        caption: empty for an image that cannot be read.
        caption_from_file: whether somebody wrote the caption; otherwise it was made from a name.
        width: in pixels, upright; 0 for an image that cannot be read.
        height: likewise.
        is_pixel_art: whether training enlarges it like pixel art.
        sharpness: see image_stats.sharpness.
        preview: a small JPEG.
        kinds: of the findings that name the image.
    """

    path: str
    file: Path
    caption: str = ""
    caption_from_file: bool = False
    width: int = 0
    height: int = 0
    is_pixel_art: bool = False
    sharpness: float | None = None
    preview: bytes = b""
    kinds: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """Something to look at: what it is, in which files, and what to do.

    Args:
        kind: a short name.
        is_wrong: False if it may be intended.
        title: one line.
        remedy: what the user can do.
        files: paths of the images, relative to the data folder.
        details: more about some of the files, and maybe about others.
        pairs: two files that belong together and how they differ.
    """

    kind: str
    is_wrong: bool
    title: str
    remedy: str
    files: list[str]
    details: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str, str]] = field(default_factory=list)

    def groups(self) -> list[list[str]]:
        """The files in groups that belong together; without pairs, each alone."""
        group = {file: [file] for file in self.files}
        for one, other, _ in self.pairs:
            if group[one] is not group[other]:
                group[one] += group[other]
                for file in group[other]:
                    group[file] = group[one]
        return list({id(members): members for members in group.values()}.values())


def relative_name(file: Path, folder: Path) -> str:
    """A path as the report names it: relative to the data folder, with forward slashes, as
    Unicode."""
    path = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(words: Sequence[str], limit: int = 8) -> str:
    """The first words of a list, and how many more there are."""
    shown = ", ".join(words[:limit])
    return f"{shown} and {len(words) - limit} more" if len(words) > limit else shown

"""What the dataset doctor finds, as data: pictures and findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Picture:
    """One file and what was seen of it; path relative to the data folder, width and height in
    pixels, upright."""

    path: str
    file: Path
    caption: str = ""
    found: bool = False  # whether the caption stood there or was made
    width: int = 0
    height: int = 0
    sharpness: float | None = None
    preview: bytes = b""
    kinds: list[str] = field(default_factory=list)  # of the findings that name it


@dataclass(frozen=True)
class Finding:
    """Something to look at: what, in which files, what to do; details says more of some of the
    files.

    wrong is False where it may well be meant. pairs are two of the files that belong together each,
    with a word on how they differ.
    """

    kind: str
    wrong: bool
    title: str
    remedy: str
    files: list[str]
    details: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str, str]] = field(default_factory=list)

    def groups(self) -> list[list[str]]:
        """The files in groups that belong together; each alone where there are no pairs."""
        group = {file: [file] for file in self.files}
        for one, other, _ in self.pairs:
            if group[one] is not group[other]:
                group[one] += group[other]
                for file in group[other]:
                    group[file] = group[one]
        return list({id(members): members for members in group.values()}.values())


def relative(file: Path, folder: Path) -> str:
    """A path as the report names it: below the data folder, with forward slashes, as Unicode."""
    path = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def some(words: Sequence[str], most: int = 8) -> str:
    """The first few of a list, with how many more there are."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")


def several(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"

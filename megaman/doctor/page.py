"""The dataset doctor's report as a page for the browser, with every image at most once."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from megaman.doctor.checks import Report
from megaman.doctor.findings import CheckedImage, Finding
from megaman.errors import plural
from megaman.pages.html import render

MAX_SHOWN, MAX_SHOWN_NOTES = 24, 6  # images of a finding that are shown; the rest is named
MAX_LINES = 8  # about a finding's files that are not folded away
MAX_IMAGES = 1000  # on the page without a finding: more make it slow to open
MAX_TERMS = 40  # of the most frequent tags on the page

# What a finding is called where there is little room.
NAMES = {
    "unreadable": "cannot be used",
    "sorted_out": "sorted out",
    "pixel_art": "pixel art",
    "tiny": "tiny",
    "small": "small",
    "long": "far from square",
    "blurred": "blurred",
    "duplicates": "near-duplicate",
    "no_caption": "no caption",
    "empty_caption": "empty caption",
    "encoding": "caption's encoding",
    "metadata": "metadata lines",
    "metadata_encoding": "metadata's encoding",
    "doubled_caption": "same caption",
    "long_caption": "long caption",
    "no_trigger": "no trigger word",
    "class_trigger": "trigger word",
    "no_agreement": "no common beginning",
    "tag_twice": "a tag twice",
    "slips": "likely typo",
    "in_every": "in every caption",
    "in_nearly_all": "lacks a common phrase",
    "balance_direction": "the frequent direction",
    "balance_view": "the frequent view",
    "balance_pose": "the frequent pose",
    "balance_framing": "the frequent framing",
    "balance_unnamed": "names no view or pose",
    "in_one": "in one only",
}


@dataclass(frozen=True)
class _Line:
    """A file of a finding that its card does not show, or two that belong together."""

    images: list[CheckedImage]
    text: str


@dataclass(frozen=True)
class _Card:
    """A finding with the groups of images that its card shows, and lines about the others."""

    finding: Finding
    groups: list[list[CheckedImage]]
    lines: list[_Line]


def as_page(report: Report, folder: Path, mark: str) -> str:
    """The page as HTML; its links lead from folder to the images. mark is noted in its head."""
    cards = _make_cards(report)
    shown = {image.path for card in cards for group in card.groups for image in group}
    others = [image for image in report.readable if image.path not in shown]
    others.sort(key=lambda image: not image.kinds)
    numbers = {image.path: number for number, image in enumerate(report.images)}
    linked = shown | {image.path for image in others[:MAX_IMAGES]}

    def link(image: CheckedImage) -> str:
        return _link(image.file, folder)

    def anchor(image: CheckedImage) -> str:
        return f"image-{numbers[image.path]}" if image.path in linked else ""

    return render(
        "report.html",
        {"link": link, "anchor": anchor, "preview": _data_url, "plural": plural},
        mark=mark,
        report=report,
        cards=cards,
        facts=_facts(report),
        names=NAMES,
        wrong={finding.kind for finding in report.findings if finding.is_wrong},
        others=others[:MAX_IMAGES],
        num_more=len(others[MAX_IMAGES:]),
        max_lines=MAX_LINES,
        terms=report.terms.most_common(MAX_TERMS),
        once=sorted(term for term, count in report.terms.items() if count == 1),
        sides=_count_sides(report),
    )


def _make_cards(report: Report) -> list[_Card]:
    """The findings' cards in order. Each image is shown by one card at most: by the first that
    shows it next to another, or else by the first that names it."""
    by_path = {image.path: image for image in report.images}
    shown = {image.path for image in report.images if not image.preview}  # cannot be shown
    groups = {}
    for finding in sorted(report.findings, key=lambda finding: not finding.pairs):
        groups[finding.kind] = list(_choose_groups(finding, shown))
        shown.update(path for group in groups[finding.kind] for path in group)
    cards = []
    for finding in report.findings:
        pictured = {path for group in groups[finding.kind] for path in group}
        images = [[by_path[path] for path in group] for group in groups[finding.kind]]
        lines = [
            _Line([by_path[path] for path in paths], text)
            for paths, text in _describe_files(finding)
            if not pictured.issuperset(paths)
        ]
        cards.append(_Card(finding, images, lines))
    return cards


def _choose_groups(finding: Finding, shown: set[str]) -> Iterator[list[str]]:
    """The finding's groups without an image that is shown already, as many as a card shows."""
    left = MAX_SHOWN if finding.is_wrong else MAX_SHOWN_NOTES
    for group in finding.groups():
        if left > 0 and shown.isdisjoint(group):
            yield group[:left]
            left -= len(group)


def _describe_files(finding: Finding) -> Iterable[tuple[list[str], str]]:
    """Each file of a finding with what there is to say about it, or each pair of files."""
    if finding.pairs:
        return [([one, other], difference) for one, other, difference in finding.pairs]
    return [([file], finding.details.get(file, "")) for file in finding.files]


def _link(file: Path, folder: Path) -> str:
    """A URL of the file, relative to folder."""
    try:
        return quote(os.fsencode(os.path.relpath(file, folder).replace(os.sep, "/")))
    except ValueError:  # another drive on Windows
        return file.resolve().as_uri()


def caption_counts(images: list[CheckedImage]) -> str:
    written = len([image for image in images if image.caption_from_file])
    return f"{written} found, {len(images) - written} made from names"


def size_range(images: list[CheckedImage]) -> str:
    """The smallest and the largest size of an image."""
    if not images:
        return ""
    sizes = sorted((image.width * image.height, image.width, image.height) for image in images)
    ends = dict.fromkeys(f"{width}x{height}" for _, width, height in (sizes[0], sizes[-1]))
    return f", {' to '.join(ends)}"


def _facts(report: Report) -> dict[str, str]:
    """The head of the page."""
    images = report.readable
    return {
        "folder": str(report.data_dir),
        "images": f"{len(images)}{size_range(images)}",
        "captions": caption_counts(images),
        "resolution": str(report.resolution),
        "trigger word": report.trigger or "none that most captions begin with",
    }


def _count_sides(report: Report) -> dict[str, int]:
    """How many images have a shorter side of how many times the resolution, without zeros."""
    names = ["at most half", "below it", "1 to 2 times", "2 to 4 times", "more"]
    counts = dict.fromkeys(names, 0)
    for image in report.readable:
        counts[_side_name(min(image.width, image.height) / report.resolution)] += 1
    return {name: count for name, count in counts.items() if count}


def _side_name(ratio: float) -> str:
    if ratio <= 0.5:
        return "at most half"
    if ratio < 1:
        return "below it"
    if ratio < 2:
        return "1 to 2 times"
    return "2 to 4 times" if ratio < 4 else "more"


def _data_url(preview: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(preview).decode()}"

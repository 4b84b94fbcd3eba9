"""The dataset doctor's report: lines for the console, a page for the browser, JSON for programs."""

from __future__ import annotations

import base64
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megaman.data.problems import printable
from megaman.doctor.checks import Report
from megaman.doctor.findings import CheckedImage, Finding, shorten
from megaman.errors import UserError, plural
from megaman.files import write_json, write_text
from megaman.pages.html import render

PAGE, DATA = "dataset_report.html", "dataset_report.json"
CLASS_PAGE, CLASS_DATA = "class_report.html", "class_report.json"  # of --class_data_dir
# In both files; a later report recognizes by it what it may replace.
MARK = "Mega Man LoRA: dataset doctor"
WIDTH = 116  # of a line for the console
MAX_SHOWN, MAX_SHOWN_NOTES = 24, 6  # images of a finding that are shown; the rest is named
MAX_IMAGES = 1000  # on the page: more make it slow to open
MAX_TERMS = 40  # of the most frequent tags on the page
TERMS_IN_LINE = 6  # on the console

# What a finding is called where there is little room.
NAMES = {
    "unreadable": "cannot be used",
    "sorted_out": "sorted out",
    "tiny": "tiny",
    "small": "small",
    "long": "far from square",
    "blurred": "blurred",
    "duplicates": "near-duplicate",
    "no_caption": "no caption",
    "empty_caption": "empty caption",
    "encoding": "caption's encoding",
    "metadata": "metadata lines",
    "doubled_caption": "same caption",
    "long_caption": "long caption",
    "no_trigger": "no trigger word",
    "class_trigger": "trigger word",
    "no_agreement": "no common beginning",
    "tag_twice": "a tag twice",
    "slips": "likely typo",
    "in_every": "in every caption",
    "in_one": "in one only",
}


def write_report(folder: Path, report: Report, page: str = PAGE, data: str = DATA) -> list[str]:
    """Write a page and its data into folder, as dataset_report.html and dataset_report.json;
    returns a summary as lines for the console.

    Raises UserError if a file of such a name exists that is not an earlier report.
    """
    for path in (folder / page, folder / data):
        if os.path.lexists(path) and not _is_report(path):
            raise UserError(
                f"{path} is not a report of this program",
                "Move it or choose another --output_dir",
            )
    write_json(folder / data, as_json(report))
    write_text(folder / page, as_page(report, folder))
    return [*summary(report), _line("report", f"{folder / page}, {folder / data}")]


def _is_report(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(4096)
    except OSError:
        return False


def summary(report: Report) -> list[str]:
    """The report in less than forty lines: what was checked, every finding with its files and what
    to do."""
    images = report.readable
    trigger = f"; trigger word {report.trigger!r}" if report.trigger else ""
    count = plural(len(images), "image")
    lines = [
        _line("images", f"{count} in {report.data_dir}{_size_range(images)}"),
        _line("captions", f"{_caption_counts(images)}{trigger}"),
    ]
    if report.shapes:
        lines.append(_line("shapes", _counts(report.shapes)))
    if report.buckets:
        lines.append(_line("buckets", _counts(report.buckets)))
    if report.terms:
        frequent = _counts(dict(report.terms.most_common(TERMS_IN_LINE)))
        lines.append(_line(report.term, f"{frequent}; {len(report.terms)} in all"))
    for finding in report.findings:
        lines += _finding_lines(finding)
    if not report.is_wrong:
        lines.append(_line("verdict", "nothing wrong was found"))
    return lines


def _finding_lines(finding: Finding) -> list[str]:
    label = "wrong" if finding.is_wrong else "look at"
    files = f": {shorten(finding.files, 3)}" if finding.files else ""
    return [_line(label, finding.title + files), _line("", finding.remedy)]


def _line(label: str, text: str) -> str:
    return f"{label:<10} {textwrap.shorten(printable(text), WIDTH, placeholder=' ...')}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _caption_counts(images: list[CheckedImage]) -> str:
    written = len([image for image in images if image.caption_from_file])
    return f"{written} found, {len(images) - written} made from names"


def _size_range(images: list[CheckedImage]) -> str:
    """The smallest and the largest size of an image."""
    if not images:
        return ""
    sizes = sorted((image.width * image.height, image.width, image.height) for image in images)
    ends = dict.fromkeys(f"{width}x{height}" for _, width, height in (sizes[0], sizes[-1]))
    return f", {' to '.join(ends)}"


def as_json(report: Report) -> dict[str, Any]:
    """The whole report for programs; paths are relative to data_dir, with forward slashes."""
    return {
        "made_by": MARK,
        "version": 1,
        "data_dir": str(report.data_dir),
        "resolution": report.resolution,
        "trigger_word": report.trigger,
        "wrong": report.is_wrong,
        "findings": [_finding_as_json(finding) for finding in report.findings],
        "term": report.term,
        "terms": dict(report.terms),
        "shapes": report.shapes,
        "buckets": report.buckets,
        "pictures": [_image_as_json(image) for image in report.images],
    }


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    details = finding.details
    return {
        "kind": finding.kind,
        "wrong": finding.is_wrong,
        "title": finding.title,
        "remedy": finding.remedy,
        "files": finding.files,
        "details": {path: details[path] for path in finding.files if path in details},
        "pairs": [
            {"pictures": [one, other], "difference": difference}
            for one, other, difference in finding.pairs
        ],
    }


def _image_as_json(image: CheckedImage) -> dict[str, Any]:
    return {
        "path": image.path,
        "width": image.width,
        "height": image.height,
        "sharpness": None if image.sharpness is None else round(image.sharpness, 3),
        "caption": image.caption,
        "caption_found": image.caption_from_file,
        "findings": image.kinds,
    }


def as_page(report: Report, folder: Path) -> str:
    """The page as HTML; its links lead from folder to the images."""
    by_path = {image.path: image for image in report.images}
    wrong = {finding.kind for finding in report.findings if finding.is_wrong}

    def link(image: CheckedImage) -> str:
        return _link(image.file, folder)

    def shown(finding: Finding) -> Iterator[list[CheckedImage]]:
        for group in _shown_groups(finding):
            yield [by_path[path] for path in group]

    images = sorted(
        report.images, key=lambda image: (wrong.isdisjoint(image.kinds), not image.kinds)
    )
    return render(
        "report.html",
        {"link": link, "shown": shown, "preview": _data_url, "plural": plural},
        mark=MARK,
        report=report,
        facts=_facts(report),
        names=NAMES,
        wrong=wrong,
        images=images[:MAX_IMAGES],
        num_more=len(images[MAX_IMAGES:]),
        max_shown=MAX_SHOWN,
        max_shown_notes=MAX_SHOWN_NOTES,
        terms=report.terms.most_common(MAX_TERMS),
        once=sorted(term for term, count in report.terms.items() if count == 1),
        sides=_count_sides(report),
    )


def _link(file: Path, folder: Path) -> str:
    """A URL of the file, relative to folder."""
    try:
        return quote(os.fsencode(os.path.relpath(file, folder).replace(os.sep, "/")))
    except ValueError:  # another drive on Windows
        return file.resolve().as_uri()


def _shown_groups(finding: Finding) -> Iterator[list[str]]:
    """The finding's files in groups, as many as are shown."""
    left = MAX_SHOWN if finding.is_wrong else MAX_SHOWN_NOTES
    for group in finding.groups():
        if left > 0:
            yield group[:left]
        left -= len(group)


def _facts(report: Report) -> dict[str, str]:
    """The head of the page."""
    images = report.readable
    return {
        "folder": str(report.data_dir),
        "images": f"{len(images)}{_size_range(images)}",
        "captions": _caption_counts(images),
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

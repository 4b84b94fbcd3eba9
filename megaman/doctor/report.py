"""The dataset doctor's report: lines for the console, a page for the browser, JSON for programs."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

from megaman.data.problems import printable
from megaman.doctor.checks import Report
from megaman.doctor.findings import CheckedImage, Finding, shorten
from megaman.doctor.page import as_page, caption_counts, size_range
from megaman.errors import UserError, plural
from megaman.files import write_json, write_text

PAGE, DATA = "dataset_report.html", "dataset_report.json"
CLASS_PAGE, CLASS_DATA = "class_report.html", "class_report.json"  # of --class_data_dir
# In both files; a later report recognizes by it what it may replace.
MARK = "Mega Man LoRA: dataset doctor"
WIDTH = 116  # of a line for the console
TERMS_IN_LINE = 6  # on the console
# Findings whose files differ in what is wrong, and for how many files the console says it.
WITH_REASONS, MAX_REASONS = ("unreadable", "empty_caption", "encoding"), 3


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
    write_text(folder / page, as_page(report, folder, MARK))
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
        _line("images", f"{count} in {report.data_dir}{size_range(images)}"),
        _line("captions", f"{caption_counts(images)}{trigger}"),
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
    if finding.kind in WITH_REASONS:
        files = finding.files[:MAX_REASONS]
        reasons = [_line("", f"{file}: {finding.details[file]}") for file in files]
        more = len(finding.files) - len(files)
        title = f"{finding.title}, {more} of them in the report only" if more else finding.title
        return [_line(label, title), *reasons, _line("", finding.remedy)]
    files = f": {shorten(finding.files, 3)}" if finding.files else ""
    return [_line(label, finding.title + files), _line("", finding.remedy)]


def _line(label: str, text: str) -> str:
    return f"{label:<10} {textwrap.shorten(printable(text), WIDTH, placeholder=' ...')}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


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

"""The dataset doctor's report: a page of lines for the console, a page for the browser, JSON for
programs."""

from __future__ import annotations

import base64
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megaman.data.problems import printable
from megaman.doctor.checks import Report
from megaman.doctor.findings import Finding, Picture, several, some
from megaman.errors import UserError
from megaman.files import write_json, write_text
from megaman.pages.html import render

PAGE, DATA = "dataset_report.html", "dataset_report.json"
# in both files, by which the next report knows that it may replace them
MARK = "Mega Man LoRA: dataset doctor"
WIDTH = 116  # of a line for the console
SHOWN, SHOWN_OF_NOTES = 24, 6  # pictures of a finding that are shown; the rest is named
SHEET = 1000  # pictures on the contact sheet: more make the page slow to open
TERMS = 40  # of the most frequent tags


def write_report(folder: Path, report: Report) -> list[str]:
    """Write dataset_report.html and dataset_report.json into folder; returns the summary as lines
    for the console.

    Raises UserError where a file of such a name is there that is not an earlier report.
    """
    for path in (folder / PAGE, folder / DATA):
        if os.path.lexists(path) and not _is_ours(path):
            raise UserError(
                f"{path} is not a report of this program", "Move it or name another --output_dir"
            )
    write_json(folder / DATA, as_json(report))
    write_text(folder / PAGE, as_page(report, folder))
    return [*lines(report), _line("report", f"{folder / PAGE}, {folder / DATA}")]


def _is_ours(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(4096)
    except OSError:
        return False


def lines(report: Report) -> list[str]:
    """The report in less than forty lines: what was looked at, every finding with its files and
    what to do."""
    good = report.readable
    found = sum(picture.found for picture in good)
    told = [
        _line("pictures", f"{several(len(good), 'picture')} in {report.data_dir}{_sides(good)}")
    ]
    trigger = f"; trigger word {report.trigger!r}" if report.trigger else ""
    told.append(_line("captions", f"{found} found, {len(good) - found} made from names{trigger}"))
    if report.shapes:
        told.append(
            _line("shapes", ", ".join(f"{name} {count}" for name, count in report.shapes.items()))
        )
    if report.buckets:
        told.append(
            _line("buckets", ", ".join(f"{size} {count}" for size, count in report.buckets.items()))
        )
    if report.terms:
        most = [f"{term} {count}" for term, count in report.terms.most_common(6)]
        told.append(_line(report.term, ", ".join(most) + (f"; {len(report.terms)} in all")))
    for finding in report.findings:
        files = f": {some(finding.files, 3)}" if finding.files else ""
        told += [
            _line("wrong" if finding.wrong else "look at", finding.title + files),
            _line("", finding.remedy),
        ]
    if not report.wrong:
        told.append(_line("verdict", "nothing wrong was found"))
    return told


def _line(head: str, text: str) -> str:
    return f"{head:<10} {textwrap.shorten(printable(text), WIDTH, placeholder=' ...')}"


def _sides(pictures: list[Picture]) -> str:
    """The smallest and the largest of the pictures' sizes."""
    sizes = sorted({(p.width * p.height, p.width, p.height) for p in pictures})
    ends = dict.fromkeys(f"{width}x{height}" for _, width, height in (sizes[:1] + sizes[-1:]))
    return ", " + " to ".join(ends) if ends else ""


def as_json(report: Report) -> dict[str, Any]:
    """All of it for programs; paths are relative to data_dir, with forward slashes."""
    return {
        "made_by": MARK,
        "version": 1,
        "data_dir": str(report.data_dir),
        "resolution": report.resolution,
        "trigger_word": report.trigger,
        "wrong": report.wrong,
        "findings": [
            {
                "kind": finding.kind,
                "wrong": finding.wrong,
                "title": finding.title,
                "remedy": finding.remedy,
                "files": finding.files,
                "details": {
                    path: finding.details[path] for path in finding.files if path in finding.details
                },
                "pairs": [
                    {"pictures": [one, other], "difference": how}
                    for one, other, how in finding.pairs
                ],
            }
            for finding in report.findings
        ],
        "term": report.term,
        "terms": dict(report.terms),
        "shapes": report.shapes,
        "buckets": report.buckets,
        "pictures": [
            {
                "path": picture.path,
                "width": picture.width,
                "height": picture.height,
                "sharpness": None if picture.sharpness is None else round(picture.sharpness, 3),
                "caption": picture.caption,
                "caption_found": picture.found,
                "findings": picture.kinds,
            }
            for picture in report.pictures
        ],
    }


def as_page(report: Report, folder: Path) -> str:
    """The page; its links to the pictures lead from folder to where they are."""
    by_path = {picture.path: picture for picture in report.pictures}
    wrong = {finding.kind for finding in report.findings if finding.wrong}

    def link(picture: Picture) -> str:
        try:
            return quote(os.fsencode(os.path.relpath(picture.file, folder).replace(os.sep, "/")))
        except ValueError:  # on Windows, another drive
            return picture.file.resolve().as_uri()

    def shown(finding: Finding) -> Iterable[list[Picture]]:
        """The finding's pictures in groups, as many as there is room for."""
        room = SHOWN if finding.wrong else SHOWN_OF_NOTES
        for group in finding.groups():
            if room > 0:
                yield [by_path[path] for path in group[:room]]
            room -= len(group)

    pictures = sorted(report.pictures, key=lambda p: (not wrong & set(p.kinds), not p.kinds))
    filters = {"link": link, "shown": shown, "preview": _data_url, "several": several}
    return render(
        "report.html",
        filters,
        mark=MARK,
        report=report,
        facts=_facts(report),
        titles={finding.kind: finding.title for finding in report.findings},
        names=NAMES,
        wrong=wrong,
        pictures=pictures[:SHEET],
        left_out=len(pictures) - len(pictures[:SHEET]),
        room=SHOWN,
        less_room=SHOWN_OF_NOTES,
        terms=report.terms.most_common(TERMS),
        once=sorted(term for term, count in report.terms.items() if count == 1),
        sides=_side_counts(report),
    )


# What a finding is called where there is little room.
NAMES = {
    "unreadable": "cannot be used", "tiny": "tiny", "small": "small", "long": "far from square", "blurred": "blurred",
    "duplicates": "near-duplicate", "no_caption": "no caption", "empty_caption": "empty caption",
    "encoding": "caption's encoding", "metadata": "metadata lines", "doubled_caption": "doubled caption",
    "long_caption": "long caption", "no_trigger": "no trigger word", "no_agreement": "no common beginning",
    "tag_twice": "a tag twice", "slips": "likely slip", "in_every": "in every caption",
    "in_one": "in one only"}  # fmt: skip


def _facts(report: Report) -> dict[str, str]:
    good = report.readable
    found = sum(picture.found for picture in good)
    facts = {"folder": str(report.data_dir), "pictures": str(len(good)) + _sides(good)}
    facts["captions"] = f"{found} found, {len(good) - found} made from names"
    facts["resolution"] = str(report.resolution)
    facts["trigger word"] = report.trigger or "none that most captions begin with"
    return facts


def _side_counts(report: Report) -> dict[str, int]:
    """How many pictures have a shorter side of how many times the resolution."""
    limits = {
        "at most half": 0.5,
        "below it": 1,
        "1 to 2 times": 2,
        "2 to 4 times": 4,
        "more": float("inf"),
    }
    counts = dict.fromkeys(limits, 0)
    for picture in report.readable:
        times = min(picture.width, picture.height) / report.resolution
        name = next(
            name
            for name, limit in limits.items()
            if times < limit or (limit == 0.5 and times == 0.5)
        )
        counts[name] += 1
    return {name: count for name, count in counts.items() if count}


def _data_url(preview: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(preview).decode()}"

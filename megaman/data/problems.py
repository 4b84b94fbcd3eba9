"""What is wrong with a folder of pictures: as lines to print, as dataset_problems.json, as a reason
not to go on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.data.captions import JOINERS, MOST_TOKENS
from megaman.errors import UserError
from megaman.files import write_json, write_text

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset

INSTRUCTIONS = Path(__file__).parent.parent / "pages" / "templates" / "instructions.txt"
MOST_CUT = 3  # captions whose end is printed


def too_bad(dataset: MegaManDataset, skip_bad: bool) -> UserError | None:
    """What to say where nothing is left to train on, or, unless skip_bad, less than half of what a
    person put there."""
    good, bad, place = len(dataset), len(dataset.problems), f"{dataset.flag} {dataset.data_dir}"
    if not good:
        return UserError(
            f"{place} holds no picture that can be used", "Put JPG, PNG, BMP or WebP there"
        )
    if bad <= good or skip_bad:
        return None
    remedy = f"Mend them, or train on the other {good} with --skip_bad_images"
    return UserError(f"{bad} of the {good + bad} files in {place} cannot be used", remedy)


def first_too_bad(datasets: Iterable[MegaManDataset], skip_bad: bool) -> UserError | None:
    """The same for several: the first error there is."""
    return next((error for dataset in datasets if (error := too_bad(dataset, skip_bad))), None)


def write_instructions(folder: Path) -> Path:
    """Put into a folder without pictures what a person should know who fills it, and return the
    file."""
    guide = folder / "README.md"
    if not guide.exists():
        write_text(guide, INSTRUCTIONS.read_text(encoding="utf-8"))
    return guide


def write_problems(path: Path, *datasets: MegaManDataset) -> list[str]:
    """Write every file of these folders that was left out, every caption to look at, and every one
    that was made or is too long into a JSON file; returns the same as lines, but made captions and
    most of the long ones only counted.

    Where there is nothing to tell, an earlier run's file goes, and there is no line.
    """
    bad = {file: reason for dataset in datasets for file, reason in dataset.problems.items()}
    remarks = [
        remark
        for dataset in datasets
        for remark in (*filter(None, dataset.remarks), *dataset.notes)
    ]
    remarks = list(dict.fromkeys(remarks))  # two pictures may share a file
    made = [
        (dataset, i) for dataset in datasets for i, found in enumerate(dataset.found) if not found
    ]
    long = [(dataset, i) for dataset in datasets for i, words in enumerate(dataset.cut) if words]
    if not bad and not remarks and not made and not long:
        path.unlink(missing_ok=True)
        return []
    left_out = [{"path": _text(file), "reason": _text(reason)} for file, reason in bad.items()]
    captions = [{"path": _text(file), "remark": _text(remark)} for file, remark in remarks]
    without = [
        {"path": _text(dataset.pictures[i]), "caption": _text(dataset.captions[i])}
        for dataset, i in made
    ]
    cut = [
        {"path": _text(dataset.pictures[i]), "cut": _text(dataset.cut[i])} for dataset, i in long
    ]
    write_json(
        path,
        {"left_out": left_out, "captions": captions, "made_captions": without, "cut_captions": cut},
    )
    lines = [f"left out: {entry['path']}: {entry['reason']}" for entry in left_out]
    lines += [f"captions   {entry['path']} {entry['remark']}" for entry in captions]
    for entry in cut[:MOST_CUT]:
        words = textwrap.shorten(entry["cut"], 100, placeholder=" ...")
        lines.append(
            f"captions   {entry['path']} has more than {MOST_TOKENS} tokens; cut off: {words}"
        )
    if len(cut) > MOST_CUT:
        lines.append(
            f"captions   {len(cut) - MOST_CUT} more have over {MOST_TOKENS} tokens and are cut off there"
        )
    count = sum(map(len, datasets)) + len(left_out)
    counts = f"{len(left_out)} of {count} files left out, {len(captions)} captions to look at"
    counts += f", {len(made)} made from names" * bool(made)
    lines.append(f"           {counts}; listed in {path}")
    return [printable(line) for line in lines]


def _text(value: Path | str) -> str:
    """As Unicode, which a name on Linux need not be: bytes that are not are written as escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def printable(line: str) -> str:
    """The line with whatever would move a terminal's cursor, break the line or turn it around
    written as an escape."""
    return "".join(
        mark if mark.isprintable() or mark in JOINERS else mark.encode("unicode_escape").decode()
        for mark in line
    )

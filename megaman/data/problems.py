"""What is wrong with a folder of images: as lines to print, as dataset_problems.json, as an error
that stops the run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.data.captions import JOINERS, MAX_TOKENS
from megaman.errors import UserError
from megaman.files import write_json, write_text

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset

INSTRUCTIONS = Path(__file__).parent.parent / "pages" / "templates" / "instructions.txt"
MAX_TRUNCATED = 3  # captions whose end is printed


def check_usable(datasets: Iterable[MegaManDataset], skip_bad: bool) -> None:
    """Raise UserError if a dataset has no image left or, unless skip_bad, has lost more than half
    of its files or a metadata file is not understood. Files that are sorted out on purpose do not
    count."""
    for dataset in datasets:
        good, bad = len(dataset), len(dataset.skipped.keys() - dataset.sorted_out.keys())
        place = f"{dataset.config.flag} {dataset.data_dir}"
        if dataset.unread_metadata and not skip_bad:
            file, problem = next(iter(dataset.unread_metadata.items()))
            remedy = "Fix it, or train on images with a caption of their own by --skip_bad_images"
            raise UserError(f"{printable(f'{file} {problem}')}", remedy)
        if not good:
            raise UserError(
                f"{place} holds no image that can be used", "Put JPG, PNG, BMP or WebP there"
            )
        if bad > good and not skip_bad:
            remedy = f"Fix them, or train on the other {good} with --skip_bad_images"
            raise UserError(f"{bad} of the {good + bad} files in {place} cannot be used", remedy)


def write_instructions(folder: Path) -> Path:
    """Explain in a folder without images how to fill it; returns the file."""
    guide = folder / "README.md"
    if not guide.exists():
        write_text(guide, INSTRUCTIONS.read_text(encoding="utf-8"))
    return guide


def write_problems(path: Path, datasets: Sequence[MegaManDataset]) -> list[str]:
    """Write all problems of these datasets to a JSON file: skipped files, captions with warnings,
    captions that were made from names, and captions that are too long.

    Returns them as lines to print, but captions made from names and most of the long ones only
    counted. If there are no problems, the file of an earlier run is removed and there are no lines.
    """
    problems = _collect(datasets)
    if not any(problems.values()):
        path.unlink(missing_ok=True)
        return []
    write_json(path, problems)
    num_images = sum(len(dataset) for dataset in datasets)
    return [printable(line) for line in _report(problems, num_images, path)]


def _collect(datasets: Sequence[MegaManDataset]) -> dict[str, list[dict[str, str]]]:
    """The content of dataset_problems.json."""
    skipped: dict[Path, str] = {}
    warnings: list[tuple[Path, str]] = []
    for dataset in datasets:
        skipped |= dataset.skipped
        own = [example.caption_warning for example in dataset.examples]
        warnings += [warning for warning in own if warning]
        warnings += dataset.metadata_warnings
    examples = list(chain.from_iterable(dataset.examples for dataset in datasets))
    made = [example for example in examples if not example.caption_from_file]
    long = [example for example in examples if example.truncated]
    distinct = dict.fromkeys(warnings)  # two images may share a caption file
    return {
        "left_out": [_entry(file, "reason", reason) for file, reason in skipped.items()],
        "captions": [_entry(file, "remark", warning) for file, warning in distinct],
        "made_captions": [_entry(one.image, "caption", one.caption) for one in made],
        "cut_captions": [_entry(one.image, "cut", one.truncated) for one in long],
    }


def _entry(path: Path, key: str, text: str) -> dict[str, str]:
    return {"path": _as_unicode(path), key: _as_unicode(text)}


def _report(problems: dict[str, list[dict[str, str]]], num_images: int, path: Path) -> list[str]:
    """The problems as lines for the console."""
    skipped, captions = problems["left_out"], problems["captions"]
    made, truncated = problems["made_captions"], problems["cut_captions"]
    lines = [f"skipped: {entry['path']}: {entry['reason']}" for entry in skipped]
    lines += [f"captions   {entry['path']} {entry['remark']}" for entry in captions]
    for entry in truncated[:MAX_TRUNCATED]:
        rest = textwrap.shorten(entry["cut"], 100, placeholder=" ...")
        lines.append(
            f"captions   {entry['path']} has more than {MAX_TOKENS} tokens; cut off: {rest}"
        )
    if len(truncated) > MAX_TRUNCATED:
        more = len(truncated) - MAX_TRUNCATED
        lines.append(f"captions   {more} more have over {MAX_TOKENS} tokens and are cut off there")
    counts = f"{len(skipped)} of {num_images + len(skipped)} files skipped"
    counts += f", {len(captions)} captions with warnings"
    if made:
        counts += f", {len(made)} made from names"
    return [*lines, f"           {counts}; listed in {path}"]


def _as_unicode(value: Path | str) -> str:
    """As Unicode, which a name on Linux need not be: other bytes become escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def printable(line: str) -> str:
    """The line with escapes for whatever would move the cursor, break the line or reverse it."""
    return "".join(map(_escape, line))


def _escape(character: str) -> str:
    if character.isprintable() or character in JOINERS:
        return character
    return character.encode("unicode_escape").decode()

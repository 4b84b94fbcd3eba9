"""The page of a training run, which follows it to the end: a fixed page, and next to it two scripts
with its data, which it loads again and again. From the disk it may load scripts, not JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaman.files import ASIDE, replacing, write_text
from megaman.pages.html import render

PAGE, FOLDER = "training_report.html", "training_report"
ABOUT, LIVE = "about.js", "live.js"  # what stays the same, and what changes with the steps


def write_page(folder: Path) -> Path:
    """Write the page into a run's folder and delete what a killed run left half-written; returns
    its path. Raises OSError."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for path in (folder / FOLDER).glob(f"*{ASIDE}"):
        path.unlink(missing_ok=True)
    write_text(folder / PAGE, render("training.html", {}))
    return folder / PAGE


def read_data(folder: Path, name: str) -> dict[str, Any] | None:
    """The content of one of the scripts; None if there is none. Raises OSError and ValueError."""
    path = folder / FOLDER / name
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8").removeprefix(f'trainingReport("{name}",')
    content = json.loads(text.removesuffix(");\n"))
    return content if isinstance(content, dict) else None


def write_data(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Replace one of the scripts at once; raises OSError.

    All text is escaped to ASCII, so lone surrogates in file names stay valid too.
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    with replacing(folder / FOLDER / name, lasting=False) as aside:
        aside.write_text(f'trainingReport("{name}",{text});\n', encoding="utf-8", newline="\n")

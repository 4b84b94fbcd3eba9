"""Names that the field's words have replaced stay out of the code, and texts are plain English."""

from __future__ import annotations

import io
import re
import tokenize
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = re.compile(
    "Kept|Fresh|Moments|Stamps|Hollow|Fit|Room|Drawer|Way|Encoded|Placement|Choices|CaptionStates|"
    "MUST_MATCH|keeps_sides|recognise|too_bad|look_ahead|dress|text_states|empty_states|token_ids|"
    "cut_off|until_it_fits|make_room|in_words|settle|tighten|draw_latents|draw_images|draw_noise|"
    "draw_timesteps|set_strengths|layers_of|told_config|made_config|run_notes|misfit|actual_name|"
    "asked_for"
)
PHRASE = re.compile(
    r"\b(hangs? on|told|mend(?:s|ed)?|left out|leaves? out|beside|goes on|colours?|favourites?|"
    r"neighbours?|recognised?|normalised?|licence)\b",
    re.IGNORECASE,
)
COLUMN = re.compile(r"SELECT told|told TEXT")  # of a table on users' disks
FOLDERS = ("megaman", "tests", "benchmarks")
FILES = sorted(chain(ROOT.glob("*.py"), *((ROOT / folder).rglob("*.py") for folder in FOLDERS)))
FILES.remove(Path(__file__).resolve())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
names = {path: path.relative_to(ROOT).as_posix() for path in FILES}


@cache  # for both tests: reading a source as tokens takes most of their time
def findings(path: Path) -> tuple[set[str], set[str]]:
    """The old names in a source, and the phrases in its strings and comments."""
    source = io.StringIO(path.read_text(encoding="utf-8"))
    old_names: set[str] = set()
    phrases: set[str] = set()
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.NAME and NAMES.fullmatch(token.string):
            old_names.add(f"{token.string} in line {token.start[0]}")
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            matches = PHRASE.findall(COLUMN.sub("", token.string))
            phrases |= {f"{phrase!r} in line {token.start[0]}" for phrase in matches}
    return old_names, phrases


@pytest.mark.parametrize("path", FILES, ids=names.get)
def test_no_name_of_the_old_dialect(path):
    assert not findings(path)[0]


@pytest.mark.parametrize("path", FILES, ids=names.get)
def test_docstrings_comments_and_printed_lines_are_plain_english(path):
    assert not findings(path)[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_for_users_are_plain_english(page):
    text = page.read_text(encoding="utf-8")
    assert sorted({match[0] for match in PHRASE.finditer(text)}) == []

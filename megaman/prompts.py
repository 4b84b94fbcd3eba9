"""Prompts: the built-in ones, or a file with one a line."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from megaman.errors import UserError

BUILT_IN = Path(__file__).resolve().parent.parent / "prompts.txt"
LARGEST = 4_000_000  # bytes: tens of thousands of prompts, more than anybody draws at once


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order: one a line, blank lines and lines that begin with # skipped.

    UTF-8, or UTF-16 where its mark says so. No prompt holds a line break or a control character. Raises UserError where
    the file is missing, is no text, is too large or holds no prompt.
    """
    text = _read_text(path)
    lines = [" ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line).split()) for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts_file {path} holds no prompt", "Write one prompt a line; lines with # are comments")
    return prompts


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"--prompts_file {path} is missing", "Name a text file with one prompt a line") from None
    except OSError as error:
        raise UserError(f"--prompts_file {path} cannot be read ({error.strerror})", "Name a text file") from None
    if len(content) > LARGEST:
        raise UserError(f"--prompts_file {path} is larger than {LARGEST:,} bytes", "Draw its prompts in parts")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what Windows' editor calls Unicode
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--prompts_file {path} is not UTF-8 text", "Save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"--prompts_file {path} is no text: it holds NUL characters", "Save it as UTF-8")
    return text

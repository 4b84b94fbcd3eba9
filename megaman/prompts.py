"""Prompts: the built-in ones, or a file with one a line."""

from __future__ import annotations

from pathlib import Path

from megaman.errors import UserError

BUILT_IN = Path(__file__).resolve().parent.parent / "prompts.txt"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order: one a line, blank lines and lines that begin with # skipped.

    Raises UserError where the file is missing, is no text or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--prompts_file {path} is missing", "Name a text file with one prompt a line") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"--prompts_file {path} cannot be read ({error.strerror})", "Name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts_file {path} is not UTF-8 text", "Save it as UTF-8") from None
    lines = [" ".join(line.split()) for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"--prompts_file {path} holds no prompt", "Write one prompt a line; lines with # are comments")
    return prompts

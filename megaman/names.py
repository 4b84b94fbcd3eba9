"""Names of files and folders: what Windows refuses, and what lies inside what."""

from __future__ import annotations

import os
import re
from pathlib import PureWindowsPath

NUMBERS = "123456789¹²³"  # Windows takes the small ones for ports, too
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$", *(port + n for port in ("com", "lpt") for n in NUMBERS)}
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
LONGEST = 50  # characters of a name that something is added to: file systems end at 255 bytes


def safe_name(text: str) -> str:
    """A file name made of any text, one that every system takes: Windows' devices, marks and trailing dots mended."""
    name = FORBIDDEN.sub("_", text)[:LONGEST].rstrip(". ")
    return f"_{name}" if _is_device(name) else name or "run"


def refused_by_windows(path: str) -> str | None:
    """The first part of a path that Windows would refuse or silently change, or None."""
    whole = PureWindowsPath(path)
    for part in whole.parts[bool(whole.anchor) :]:
        if part != ".." and (FORBIDDEN.search(part) or part[-1] in ". " or _is_device(part)):
            return part
    return None


def _is_device(name: str) -> bool:
    """Windows opens the console for con, and for con.txt as well."""
    return name.split(".")[0].rstrip(" ").lower() in DEVICES


def is_network(path: str) -> bool:
    """Whether a path lies on another machine: Windows would log in there, whoever's machine that is."""
    return path[:2].replace("\\", "/") == "//"


def split_strength(word: str) -> tuple[str, float]:
    """NAME:STRENGTH taken apart; the strength is 1 where none stands there, or where a file has the whole word's name.

    The drive of a Windows path is no strength, since no digit follows its colon.
    """
    path, _, strength = word.rpartition(":")
    if not path or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", strength, flags=re.ASCII) or os.path.exists(word):
        return word, 1.0
    return path, float(strength)


def is_inside(path: object, folder: str) -> bool:
    """Whether the path lies below the folder, links followed; neither has to exist, and any JSON value may be asked."""
    return below(path, folder) not in (None, ".") if isinstance(path, str) else False


def below(path: str, folder: str) -> str | None:
    """The path as seen from the folder, "." for the folder itself, None where it lies elsewhere."""
    try:
        path, folder = (os.path.normcase(os.path.realpath(name)) for name in (path, folder))
        within = os.path.commonpath([path, folder]) == folder
    except (OSError, ValueError):  # another drive; a name that no system takes
        return None
    return os.path.relpath(path, folder) if within else None

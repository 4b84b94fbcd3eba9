"""Files written so that nobody ever finds half of one: aside, flushed to the disk, then renamed.

Also names of files and folders (what Windows refuses, what lies inside what), and what tells that a
file has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from megaman.errors import UserError

ASIDE = ".aside"  # ends the name of what is still being written; never taken for the real thing

NUMBERS = "123456789¹²³"  # Windows takes the small ones for ports, too
DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(port + n for port in ("com", "lpt") for n in NUMBERS),
}
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
LONGEST = 50  # characters of a name that something is added to: file systems end at 255 bytes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside the real one to write to; on success it takes the real one's place in one
    step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
        _flush_names(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder: yield one beside it to fill; on success it takes the real one's
    place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}{ASIDE}")
    former = folder.with_name(f"{folder.name}.{os.getpid()}.former{ASIDE}")
    for left in (
        aside,
        former,
    ):  # by a run that was killed; in a container the next one has the same process id
        restore_former(left)
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            _flush_names(path) if path.is_dir() else _flush(path)
        _flush_names(aside)
        if folder.exists():  # a folder cannot be renamed onto a full one
            os.replace(folder, former)
        os.replace(aside, folder)
        _flush_names(folder.parent)
    finally:
        restore_former(former)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def restore_former(former: Path) -> None:
    """Put back a folder that was moved aside where nothing took its place; any other path is left
    as it is."""
    name, moved, _ = former.name.partition(f".former{ASIDE}")
    if moved and former.is_dir():
        folder = former.with_name(name.rpartition(".")[0])
        if not folder.exists():
            os.replace(former, folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder in such a way that a stop midway leaves no part of it under its own name."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}{ASIDE}")
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """To the disk, so that a power cut after the rename finds the content there."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """The same for the names in a folder; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text; half characters, which names on Linux may hold, become escapes (in JSON they
    are read back)."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing", "The folder is not complete; name another one"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{path} is not valid JSON ({reason})", "Restore the file or name another folder"
        ) from None


def safe_name(text: str) -> str:
    """A file name made of any text, one that every system takes: Windows' devices, marks and
    trailing dots mended."""
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
    """Whether a path lies on another machine: Windows would log in there, whoever's machine that
    is."""
    return path[:2].replace("\\", "/") == "//"


def split_strength(word: str) -> tuple[str, float]:
    """NAME:STRENGTH taken apart; the strength is 1 where none stands there, or where a file has the
    whole word's name.

    The drive of a Windows path is no strength, since no digit follows its colon.
    """
    path, _, strength = word.rpartition(":")
    if (
        not path
        or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", strength, flags=re.ASCII)
        or os.path.exists(word)
    ):
        return word, 1.0
    return path, float(strength)


def is_inside(path: object, folder: str) -> bool:
    """Whether the path lies below the folder, links followed; neither has to exist, and any JSON
    value may be asked."""
    return path_within(path, folder) not in (None, ".") if isinstance(path, str) else False


def path_within(path: str, folder: str) -> str | None:
    """The path as seen from the folder, "." for the folder itself, None where it lies elsewhere."""
    try:
        path, folder = (os.path.normcase(os.path.realpath(name)) for name in (path, folder))
        within = os.path.commonpath([path, folder]) == folder
    except (OSError, ValueError):  # another drive; a name that no system takes
        return None
    return os.path.relpath(path, folder) if within else None


class Stamp(NamedTuple):
    """A file's size in bytes and its time of change in nanoseconds."""

    size: int
    changed: int


def stamp_of(path: Path) -> Stamp:
    """Raises OSError where there is no such file."""
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns)


def digest_of(path: Path) -> bytes:
    """A hash of a file's bytes, BLAKE2b with 160 bits; raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).digest()

"""Files written so that nobody ever finds half of one: aside, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaman.errors import UserError

ASIDE = ".aside"  # ends the name of what is still being written; never taken for the real thing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside the real one to write to; on success it takes the real one's place in one step."""
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
    """The same for a folder: yield one beside it to fill; on success it takes the real one's place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}{ASIDE}")
    former = folder.with_name(f"{folder.name}.{os.getpid()}.former{ASIDE}")
    for left in (aside, former):  # by a run that was killed; in a container the next one has the same process id
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
    """Put back a folder that was moved aside where nothing took its place; any other path is left as it is."""
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
    """Write a text; half characters, which names on Linux may hold, become escapes (in JSON they are read back)."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing", "The folder is not complete; name another one") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not valid JSON ({reason})", "Restore the file or name another folder") from None

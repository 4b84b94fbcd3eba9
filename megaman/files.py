"""Atomic writes: to a temporary name, with the umask's mode, flushed to the disk, then renamed.

Also the names of files and folders (what Windows refuses, which path lies inside which), and stamps
and digests that show whether a file has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from megaman.errors import UserError, summarize_error, system_remedy

WINDOWS = os.name == "nt"
ASIDE = ".aside"  # the suffix of files and folders that are still being written
# Seconds between tries to rename on Windows, which refuses it while another program has the file
# or one in the folder open: a virus scanner or the search index looks into what was just written.
PAUSES = (0.01, 0.04, 0.1, 0.2, 0.4, 0.8)

PORTS = "123456789¹²³"  # Windows accepts superscript digits as port numbers, too
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"}
DEVICES |= {f"com{port}" for port in PORTS} | {f"lpt{port}" for port in PORTS}
STRENGTH = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", flags=re.ASCII)
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
MAX_NAME_LENGTH = 50  # characters, with more to be added: file systems allow 255 bytes


@contextlib.contextmanager
def replacing(path: Path, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to the real one; on success it replaces the real one at once.

    What is not lasting may be lost in a power cut, and costs no wait for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    try:
        yield temporary
        share(temporary)
        if lasting:
            _flush(temporary)
        _rename(temporary, path)
        if lasting:
            _flush_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it replaces the real one, if there is one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}{ASIDE}")
    former = folder.with_name(f"{folder.name}.{os.getpid()}.former{ASIDE}")
    # A killed run may have had the same process id: in containers they repeat.
    for path in (temporary, former):
        restore_former(path)
        shutil.rmtree(path, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        _flush_tree(temporary)
        if folder.exists():  # a folder cannot be renamed onto one that is not empty
            _rename(folder, former)
        _rename(temporary, folder)
        _flush_names(folder.parent)
    finally:
        restore_former(former)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    """Rename a file or folder, in place of one that is there; on Windows try it for a while."""
    for pause in PAUSES if WINDOWS else ():
        try:
            os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    os.replace(source, target)


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder, and those that it is in, if it is missing.

    Raises UserError, which names the flag and what is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        places = [path for path in (folder, *folder.parents) if os.path.lexists(path)]
        if not places or places[0].is_dir():
            message = f"{flag} {folder} cannot be made ({summarize_error(error)})"
            raise UserError(message, system_remedy(error)) from None
        is_lost = places[0].is_symlink() and not places[0].exists()
        kind = "a link to nothing" if is_lost else "no folder"
        message = f"{flag} {folder} cannot be made: {places[0]} is {kind}"
        raise UserError(message, "Choose another folder") from None


def restore_former(former: Path) -> None:
    """Move a folder back that was moved away and never replaced; other paths are left alone."""
    name, marker, _ = former.name.partition(f".former{ASIDE}")
    if marker and former.is_dir():
        folder = former.with_name(name.rpartition(".")[0])
        if not folder.exists():
            _rename(former, folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder; if that is interrupted, no partial folder remains under its name."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}{ASIDE}")
    _rename(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_names(path)
        else:
            share(path)
            _flush(path)
    _flush_names(folder)


def share(path: Path) -> None:
    """Give a file that only its owner can read, as safetensors and temporary files are made, the
    mode of every new file here.

    That mode depends on the umask and on the folder's access lists, so a file is made to see it:
    reading the umask means changing it for all threads.
    """
    if os.name != "posix" or stat.S_IMODE(path.stat().st_mode) & 0o077:
        return
    sample = path.with_name(f"{path.name}.mode{ASIDE}")
    # Some network drives refuse to change modes, which is no reason to lose the file.
    with contextlib.suppress(OSError):
        try:
            sample.touch()
            path.chmod(stat.S_IMODE(sample.stat().st_mode))
        finally:
            sample.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Write a file's content to the disk, so that it survives a power cut after the rename."""
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
    """Write text as UTF-8; lone surrogates, which Linux allows in file names, are escaped.

    In JSON the escapes are read back as what they were.
    """
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing", "The folder is incomplete; name another one"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{path} is not valid JSON ({reason})", "Restore the file or name another folder"
        ) from None


def safe_name(text: str) -> str:
    """A valid file name on every system, made from any text.

    Windows' device names get a prefix, forbidden characters become underscores, and trailing dots
    are removed.
    """
    name = FORBIDDEN.sub("_", text)[:MAX_NAME_LENGTH].rstrip(". ")
    return f"_{name}" if _is_device(name) else name or "run"


def refused_by_windows(path: str) -> str | None:
    """The first part of a path that Windows would refuse or silently change, or None."""
    whole = PureWindowsPath(path)
    parts = whole.parts[1:] if whole.anchor else whole.parts
    for part in parts:
        if part != ".." and (FORBIDDEN.search(part) or part[-1] in ". " or _is_device(part)):
            return part
    return None


def _is_device(name: str) -> bool:
    """Whether Windows opens a device for the name: con.txt is the console as well."""
    return name.split(".")[0].rstrip(" ").lower() in DEVICES


def is_network(path: str) -> bool:
    """Whether a path is on another machine, where Windows would try to log in."""
    return path[:2].replace("\\", "/") == "//"


def split_strength(word: str) -> tuple[str, float]:
    """Split NAME:STRENGTH; the strength is 1 if there is none or if a file has the whole name.

    The drive of a Windows path is no strength, since no digit follows its colon.
    """
    path, _, strength = word.rpartition(":")
    is_number = STRENGTH.fullmatch(strength) is not None
    if not path or not is_number or os.path.exists(word):
        return word, 1.0
    return path, float(strength)


def is_inside(path: object, folder: str) -> bool:
    """Whether a path, which may be any JSON value, lies below a folder; neither has to exist.

    Symbolic links are followed.
    """
    return isinstance(path, str) and path_within(path, folder) not in (None, ".")


def path_within(path: str, folder: str) -> str | None:
    """The path relative to the folder, "." for the folder itself, None if it is outside."""
    try:
        path, folder = (os.path.normcase(os.path.realpath(name)) for name in (path, folder))
        within = os.path.commonpath([path, folder]) == folder
    except (OSError, ValueError):  # another drive, or a name that no system accepts
        return None
    return os.path.relpath(path, folder) if within else None


class Stamp(NamedTuple):
    """A file's size in bytes and its modification time in nanoseconds."""

    size: int
    changed: int


def stamp_of(path: Path) -> Stamp:
    """A file's stamp; raises OSError if there is no such file."""
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns)


def digest_of(path: Path, start: int = 0) -> bytes:
    """The 160-bit BLAKE2b hash of a file's bytes from start on; raises OSError if it cannot be
    read."""
    with open(path, "rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).digest()

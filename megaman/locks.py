"""A claim on a folder: a lock of the operating system that ends with its process, however it ends.

One run has one claim, not each of its processes: the launcher's first process claims the folder and
the others trust it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megaman.errors import UserError
from megaman.files import make_folder

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".megaman_lora.lock"
# What the systems answer if another process holds the lock: flock, network drives, Windows.
HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
# Windows keeps others from reading locked bytes, so the locked one is far behind the text.
LOCKED_BYTE = 2**30
MAX_OWNER_LENGTH = 120  # characters
# The variables for rank and number of processes: of torchrun and accelerate, Intel MPI, Open MPI,
# MVAPICH.
LAUNCHERS = {
    "RANK": "WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
}

_held: set[int] = set()  # the file descriptors of this process's locks


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the only process of a run, or the first that a launcher started."""
    for rank, size in LAUNCHERS.items():
        if rank in environment:
            return environment[rank] == "0" or environment.get(size) == "1"
    return True


@contextlib.contextmanager
def claim(folder: Path, flag: str) -> Iterator[None]:
    """Make the folder if it is missing, and keep other runs out of it within this context.

    A folder in which nothing can be written or locked, such as one on some network drives, is not
    claimed. Folders that are made here and stay empty are deleted at the end.

    Raises UserError, which names the flag, if the folder cannot be made or another run has claimed
    it.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    make_folder(folder, flag)
    if not is_first_process():
        yield
        return
    file = _lock(folder, flag)
    try:
        yield
    finally:
        if file is not None:
            _release(folder / LOCK, file)
        with contextlib.suppress(OSError):  # one that is not empty ends this
            for path in made:
                path.rmdir()


def _lock(folder: Path, flag: str) -> int | None:
    """The descriptor of the folder's locked file; None if there can be no lock."""
    path = folder / LOCK
    while True:
        try:
            file = _open(path)
        except OSError:  # a read-only folder, a full disk
            return None
        try:
            _try_lock(file)
        except OSError as error:
            owner = _owner(file)
            os.close(file)
            if error.errno not in HELD:  # a file system without locks
                return None
            raise UserError(
                f"{flag} {folder} is in use by another run{owner}",
                "Wait until it has ended, or name another folder",
            ) from None
        if _is_same(path, file):
            _held.add(file)
            _write_owner(file)
            return file
        os.close(file)  # its run deleted it in this moment


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's file can be locked all the same
        return os.open(path, os.O_RDONLY)


def _try_lock(file: int) -> None:
    if sys.platform == "win32":
        os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_same(path: Path, file: int) -> bool:
    """Whether the path still names the open file; on Windows no other process can delete that."""
    if sys.platform == "win32":
        return True
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _write_owner(file: int) -> None:
    """Note which process has the lock, for the message to another one."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, owner.encode("utf-8", "replace"))


def _owner(file: int) -> str:
    """Which process has the lock, in parentheses, or "" if the file does not say it."""
    with contextlib.suppress(OSError):
        os.lseek(file, 0, os.SEEK_SET)
        text = os.read(file, MAX_OWNER_LENGTH).decode("utf-8", "replace").strip()
        return f" ({text})" if text.isprintable() and text else ""
    return ""


def _release(path: Path, file: int) -> None:
    """Delete the file and unlock it; nothing to do in a process forked from the one with the lock,
    which has closed its copy."""
    if file not in _held:
        return
    _held.remove(file)
    if sys.platform != "win32":  # while it is locked: what another run has locked must not go
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(file)
    if sys.platform == "win32":  # which refuses to delete what another run has open
        with contextlib.suppress(OSError):
            path.unlink()


def _close_all() -> None:
    """Close the locks in a forked process: a worker must not hold them after its run was killed."""
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)

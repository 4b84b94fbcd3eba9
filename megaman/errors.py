"""Errors that the user can fix: one line and an exit code, in one place."""

from __future__ import annotations

import errno
import gc
import os
import sys
import textwrap
import warnings
from collections.abc import Callable

from megaman.console import flush_output, forgiving_output

RUN_FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
# Or every library that is loaded, and 100,000 images, are looked through again and again.
GC_THRESHOLDS = 50_000, 10, 10
FREE_SPACE = "Free some space"
ANOTHER_NAME = "Choose another name, or move away what is in its place"
OWN_FOLDER = "Choose another folder, or change its permissions"
MORE_FILES = "Raise the limit of open files (ulimit -n)"
SHORTER_PATH = "Choose a folder with a shorter path, or turn on long paths in Windows"
PATH_LIMIT = 248  # characters of a folder's whole path; a file's may have 260
PATH_TOO_LONG = 206  # an error of Windows, whose errno is ENOENT as well
# What helps against an error of the system; for others it depends on the file.
SYSTEM_REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EACCES: OWN_FOLDER,
    errno.EPERM: OWN_FOLDER,
    errno.EROFS: OWN_FOLDER,
    errno.EEXIST: ANOTHER_NAME,
    errno.ENOTDIR: ANOTHER_NAME,
    errno.EISDIR: ANOTHER_NAME,
    errno.ELOOP: ANOTHER_NAME,
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Choose a file or folder that exists",
    errno.EMFILE: MORE_FILES,
    errno.ENFILE: MORE_FILES,
}
OUT_OF_MEMORY = (
    "not enough memory",
    "out of memory",
    # cuDNN and cuBLAS, which do not ask torch's allocator alone. The first means that no algorithm
    # of a convolution got the workspace that it needs.
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


BROKEN_INSTALLATION = (
    "Activate the project's environment; python megaman_lora.py --system_info shows what is wrong"
)


class UserError(Exception):
    """Something that the user can fix: what is wrong, naming the file or flag, and the remedy."""

    def __init__(self, message: str, remedy: str = "", exit_code: int = RUN_FAILED):
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.exit_code = exit_code

    def __str__(self) -> str:
        return " ".join(f"{self.message}. {self.remedy}".split()).strip()


def run_script(
    main: Callable[[list[str]], int], argv: list[str], saves_memory: str = "a smaller image"
) -> int:
    """Run a script's main and return its exit code.

    What a user can cause becomes one line on stderr; saves_memory is the remedy when memory runs
    out. Any other exception passes through.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    # numpy warns thousands of times of how diffusers' samplers hand tensors to it.
    warnings.filterwarnings("ignore", "__array", DeprecationWarning)
    with forgiving_output() as lost:
        code = _run(main, argv, saves_memory)
        flush_output()
        if lost and not code:
            reason = summarize_error(lost[0])
            print(f"error: standard output cannot be written ({reason})", file=sys.stderr)
            code = RUN_FAILED
    return code


def _run(main: Callable[[list[str]], int], argv: list[str], saves_memory: str) -> int:
    try:
        return main(argv)
    except UserError as error:
        line, code = str(error), error.exit_code
    except KeyboardInterrupt:
        line, code = "stopped by Ctrl-C; everything saved so far is kept", INTERRUPTED
    except ImportError as error:
        if (error.name or "").startswith("megaman"):
            raise
        line, code = f"{summarize_error(error)}. {BROKEN_INSTALLATION}", RUN_FAILED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        line, code = f"{_memory_reason(error)}. Try {saves_memory}", RUN_FAILED
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        line, code = _system_reason(error), RUN_FAILED
    print(f"error: {line}", file=sys.stderr)
    return code


def _memory_reason(error: Exception) -> str:
    # Python's own MemoryError has no text.
    reason = str(error).partition("\n")[0][:120] or type(error).__name__
    return f"out of memory ({reason})"


def _system_reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.filename:
        reason = f"{reason} ({error.filename})"
    elif system_remedy(error) != FREE_SPACE:
        return reason  # of no file: the others would name none
    return f"{reason}. {system_remedy(error)}".removesuffix(". ")


def system_remedy(error: OSError) -> str:
    """What helps against an error of the system, "" if that is not known."""
    if _is_path_too_long(error):
        return SHORTER_PATH
    return SYSTEM_REMEDIES.get(error.errno or 0, "")


def _is_path_too_long(error: OSError) -> bool:
    """Whether Windows refused a path for its length, of which it mostly says "not found"."""
    number = getattr(error, "winerror", None)  # None elsewhere
    if number is None or error.errno != errno.ENOENT:
        return False
    return number == PATH_TOO_LONG or (
        bool(error.filename) and len(os.path.abspath(error.filename)) >= PATH_LIMIT
    )


def summarize_error(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters, to be quoted in a message."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return textwrap.shorten(text.partition("\n")[0], 200, placeholder=" ...").rstrip(" .")


def out_of_memory(error: Exception) -> bool:
    """Whether Python, torch, cuDNN or cuBLAS ran out of memory.

    The class is compared by name, since this module does not import torch.
    """
    text = str(error)
    is_memory_error = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return is_memory_error or any(words in text for words in OUT_OF_MEMORY)


def plural(count: int, noun: str, ending: str = "s") -> str:
    """The count and the noun, with the ending of the plural unless the count is 1."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{ending}"

"""Errors that the user can fix: one line and an exit code, in one place."""

from __future__ import annotations

import io
import logging
import os
import sys
import textwrap
from collections.abc import Callable

RUN_FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that the console cannot show is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(argv)
    except UserError as error:
        line, code = str(error), error.exit_code
    except KeyboardInterrupt:
        line, code = "stopped by Ctrl-C; everything saved so far is kept", INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        line, code = f"{_memory_reason(error)}. Try {saves_memory}", RUN_FAILED
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        line, code = _disk_reason(error), RUN_FAILED
    print(f"error: {line}", file=sys.stderr)
    return code


def _memory_reason(error: Exception) -> str:
    # Python's own MemoryError has no text.
    reason = str(error).partition("\n")[0][:120] or type(error).__name__
    return f"out of memory ({reason})"


def _disk_reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    place = f" ({error.filename})" if error.filename else ""
    return f"{reason}{place}. Free some space or choose a writable folder"


class _PlainHandler(logging.Handler):
    """Passes the bare message of a record to a function, in the main process only.

    A line that cannot be written raises OSError as print does: logging's own handlers would hide
    that standard output is closed or on a full disk.
    """

    def __init__(self, write: Callable[[str], object]):
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":  # set by torchrun and accelerate launch
            self._write(self.format(record))


def print_line(line: str) -> None:
    """Print a line above the progress bars, if there are any."""
    tqdm = sys.modules.get("tqdm")  # nothing else is imported for the first line of a script
    if tqdm:
        tqdm.tqdm.write(line)
    else:
        print(line)


def install_logging(write: Callable[[str], object] = print_line) -> None:
    """Print what the package logs at level INFO and above, as plain lines on standard output.

    write prints one line. A second call replaces the first.
    """
    logger = logging.getLogger("megaman")
    for handler in [old for old in logger.handlers if isinstance(old, _PlainHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_PlainHandler(write))
    logger.setLevel(logging.INFO)


def summarize_error(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters, to be quoted in a message."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return textwrap.shorten(text.partition("\n")[0], 200, placeholder=" ...").rstrip(" .")


def out_of_memory(error: Exception) -> bool:
    """Whether Python or torch ran out of memory.

    The class is compared by name, since this module does not import torch.
    """
    is_memory_error = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return is_memory_error or "not enough memory" in str(error) or "out of memory" in str(error)

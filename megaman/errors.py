"""What a person can put right: one line and an exit code, in one place."""

from __future__ import annotations

import io
import logging
import os
import sys
import textwrap
from collections.abc import Callable

RUN_FAILED = 1
WRONG_USAGE = 2


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
    main: Callable[[list[str]], int], argv: list[str], saves_memory: str = "a smaller picture"
) -> int:
    """Run a script's main and turn what a user can cause into one line on stderr; returns the exit
    code."""
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a file name that it cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(argv)
    except UserError as error:
        line, code = str(error), error.exit_code
    except KeyboardInterrupt:
        line, code = "stopped by Ctrl-C; what was saved before stays as it is", 130
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        what = (
            str(error).partition("\n")[0][:120] or type(error).__name__
        )  # Python's own has no text
        line, code = f"too little memory ({what}). Try {saves_memory}", RUN_FAILED
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        place = f" ({error.filename})" if error.filename else ""
        line, code = (
            f"{error.strerror or error}{place}. Free some space or choose a folder that can be written",
            RUN_FAILED,
        )
    print(f"error: {line}", file=sys.stderr)
    return code


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


def install_logging(write: Callable[[str], object] = print) -> None:
    """Print what the package logs at level INFO and above, as plain lines on standard output.

    write prints one line; tqdm.write keeps progress bars intact. A second call replaces the first.
    """
    logger = logging.getLogger("megaman")
    for handler in [old for old in logger.handlers if isinstance(old, _PlainHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_PlainHandler(write))
    logger.setLevel(logging.INFO)


def summarize_error(error: BaseException) -> str:
    """What an error says, short enough to stand in a line of ours."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return textwrap.shorten(text.partition("\n")[0], 200, placeholder=" ...").rstrip(" .")


def out_of_memory(error: Exception) -> bool:
    """Python's own error, or torch's: told by name and text, since this module does not import
    torch."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "not enough memory" in str(error) or "out of memory" in str(error)

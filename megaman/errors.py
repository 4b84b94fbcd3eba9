"""What a person can put right: one line and an exit code, in one place."""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Callable

RUN_FAILED = 1
WRONG_USAGE = 2


class UserError(Exception):
    """A mistake or a lack that the user can mend: what is wrong, naming the file or flag, and what
    to do about it."""

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


def brief(error: BaseException) -> str:
    """What an error says, short enough to stand in a line of ours."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return textwrap.shorten(text.partition("\n")[0], 200, placeholder=" ...").rstrip(" .")


def out_of_memory(error: Exception) -> bool:
    """Python's own error, or torch's: told by name and text, since this module does not import
    torch."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "not enough memory" in str(error) or "out of memory" in str(error)

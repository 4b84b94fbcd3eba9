"""Errors that the user can fix: one line and an exit code, in one place."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

RUN_FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
FREE_SPACE = "Free some space"
ANOTHER_NAME = "Choose another name, or move away what is in its place"
OWN_FOLDER = "Choose another folder, or change its permissions"
MORE_FILES = "Raise the limit of open files (ulimit -n)"
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
# What writing to a closed pipe, a closed terminal, a closed descriptor or a closed socket answers;
# Windows says EINVAL for the first.
NO_READER = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN}
if os.name == "nt":
    NO_READER.add(errno.EINVAL)


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
    # numpy warns thousands of times of how diffusers' samplers hand tensors to it.
    warnings.filterwarnings("ignore", "__array", DeprecationWarning)
    with _forgiving_output() as lost:
        code = _run(main, argv, saves_memory)
        _flush_output()
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
    return SYSTEM_REMEDIES.get(error.errno or 0, "")


_lost_output: list[OSError] = []  # why lines are missing that somebody will look for


class _ForgivingStream:
    """Standard output or error, which nobody may read any more: a run continues all the same.

    When the reader is gone, as with | head -1 or a closed terminal, the rest goes nowhere; also
    what libraries write to the descriptor, and what Python flushes at the end. Other errors, such
    as a full disk, are the caller's unless is_optional.
    """

    def __init__(self, stream: TextIO, is_optional: bool):
        self._stream, self._is_optional = stream, is_optional

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ValueError:
            if not self._stream.closed:
                raise
        except OSError as error:
            if error.errno in NO_READER:
                discard(self._stream)
            elif not self._is_optional:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: TextIO) -> None:
    """Let everything that is written to a stream from now on, and what it has buffered, go
    nowhere."""
    with contextlib.suppress(OSError, ValueError):
        descriptor, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextlib.contextmanager
def _forgiving_output() -> Iterator[list[OSError]]:
    """Within this, output that nobody reads stops nothing; yields why other output was lost."""
    _open_closed_descriptors()
    former = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that the console cannot show is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, _ForgivingStream(former[0] or _nowhere(), is_optional=False))
    sys.stderr = cast(TextIO, _ForgivingStream(former[1] or _nowhere(), is_optional=True))
    _lost_output.clear()
    try:
        yield _lost_output
    finally:
        _flush_output()  # once more, after SystemExit
        sys.stdout, sys.stderr = former


def _open_closed_descriptors() -> None:
    """Open those of standard input, output and error that are closed, as with >&-.

    Else the next file that is opened, a LoRA perhaps, would be what libraries print into.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        _lost_output.append(error)
        discard(sys.stdout)
    sys.stderr.flush()


class _PlainHandler(logging.Handler):
    """Passes the bare message of a record to a function, in the main process only.

    A line that cannot be written, as on a full disk, does not stop the run; run_script reports it
    at the end.
    """

    def __init__(self, write: Callable[[str], object]):
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") != "0":  # set by torchrun and accelerate launch
            return
        line = self.format(record)
        if not line:  # an event for programs only
            return
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in NO_READER:
                _lost_output.append(error)


class _JsonFormatter(logging.Formatter):
    """A record as a JSON object: time, event ("log" for a plain line), message, and the event's
    fields."""

    def format(self, record: logging.LogRecord) -> str:
        event = getattr(record, "event", {"event": "log"})
        content = {"time": round(record.created, 3), **event, "message": record.getMessage()}
        return json.dumps(content)


def log_event(logger: logging.Logger, event: str, message: str, **fields: Any) -> None:
    """Log a message that programs get with fields of JSON's types (--log_format json).

    An empty message is for programs only.
    """
    logger.info("%s", message, extra={"event": {"event": event, **fields}})


def print_line(line: str) -> None:
    """Print a line above the progress bars, if there are any."""
    tqdm = sys.modules.get("tqdm")  # nothing else is imported for the first line of a script
    if tqdm:
        tqdm.tqdm.write(line)
    else:
        print(line)


def install_logging(write: Callable[[str], object] = print_line, log_format: str = "text") -> None:
    """Print what the package logs at level INFO and above on standard output: as plain lines, or
    with the log_format "json" as one JSON object a line.

    write prints one line. A second call replaces the first.
    """
    # PEFT imports it if it is installed, and it warns about kernels that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logger = logging.getLogger("megaman")
    for handler in [old for old in logger.handlers if isinstance(old, _PlainHandler)]:
        logger.removeHandler(handler)
    handler = _PlainHandler(write)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


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

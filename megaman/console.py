"""What the scripts print: output that may lose its reader, and the package's log lines, plain or as
JSON."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

# What writing to a closed pipe, a closed terminal, a closed descriptor or a closed socket answers;
# Windows says EINVAL for the first.
NO_READER = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN}
if os.name == "nt":
    NO_READER.add(errno.EINVAL)

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
                _discard(self._stream)
            elif not self._is_optional:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: TextIO) -> None:
    """Let everything that is written to a stream from now on, and what it has buffered, go
    nowhere."""
    with contextlib.suppress(OSError, ValueError):
        descriptor, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextlib.contextmanager
def forgiving_output() -> Iterator[list[OSError]]:
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
        flush_output()  # once more, after SystemExit
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


def flush_output() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        _lost_output.append(error)
        _discard(sys.stdout)
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

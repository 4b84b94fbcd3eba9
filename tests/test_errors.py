"""Errors that a user can fix end in one line and an exit code; bugs keep their traceback."""

from __future__ import annotations

import errno
import logging

import pytest

from megaman.errors import UserError, install_logging, run_script


def failing(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("--a is wrong", "Take b", 2), 2, "error: --a is wrong. Take b"),
        (UserError("it broke"), 1, "error: it broke."),
        (UserError("two\nlines", "and\tmore"), 1, "error: two lines. and more"),
        (KeyboardInterrupt(), 130, "Ctrl-C"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            1,
            "No space left on device (out/x). Free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "Permission denied (out)"),
        (MemoryError(), 1, "out of memory (MemoryError). Try a smaller image"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            1,
            "out of memory (CUDA out of memory",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
            1,
            "out of memory (Default",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_one_line_and_a_code(capsys, error, code, words):
    assert run_script(failing(error), []) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), KeyError("x"), OSError("no number, no file")]
)
def test_our_own_mistakes_are_not_hidden(error):
    with pytest.raises(type(error)):
        run_script(failing(error), [])


def test_success_passes_through(capsys):
    assert run_script(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def logger():
    """A module's logger; afterwards the package logs as before."""
    package = logging.getLogger("megaman")
    level, handlers = package.level, list(package.handlers)
    yield logging.getLogger("megaman.training.step")
    package.setLevel(level)
    package.handlers[:] = handlers


def test_what_the_package_logs_is_printed_once_and_plainly(logger, capsys):
    install_logging()
    install_logging()
    logger.info("step %d of %d", 1, 2)
    logger.debug("hidden")
    logging.getLogger("others").warning("not ours")
    assert capsys.readouterr().out == "step 1 of 2\n"


def test_only_the_main_process_prints(logger, capsys, monkeypatch):
    install_logging()
    monkeypatch.setenv("RANK", "1")
    logger.info("from another process")
    assert capsys.readouterr().out == ""


def test_a_line_that_cannot_be_printed_is_an_error(logger):
    def write(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    install_logging(write)
    with pytest.raises(OSError, match="No space left"):
        logger.info("step 1")

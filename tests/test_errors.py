"""Errors that a user can fix end in one line and an exit code; bugs keep their traceback."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler
from tqdm import tqdm

from megaman.config import samplers
from megaman.console import install_logging
from megaman.errors import UserError, run_script
from megaman.sampling import denoise


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
        (OSError(errno.ENAMETOOLONG, "Too long", "x"), 1, "Too long (x). Choose a shorter name\n"),
        (FileExistsError(errno.EEXIST, "There", "x"), 1, "There (x). Choose another name, or move"),
        (OSError(errno.EROFS, "Read-only", "x"), 1, "Read-only (x). Choose another folder, or"),
        (OSError(errno.EMFILE, "Too many", "x"), 1, "(x). Raise the limit of open files"),
        (OSError(errno.EIO, "Input/output error", "x"), 1, "Input/output error (x)\n"),
        (PermissionError(errno.EACCES, "Denied", "x"), 1, "Denied (x). Choose another folder, or"),
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
    ("number", "name", "says"),
    [(206, "x", True), (3, "a" * 300, True), (2, "x", False), (None, "a" * 300, False)],
)
def test_windows_says_not_found_of_a_path_that_is_too_long(capsys, number, name, says):
    error = FileNotFoundError(errno.ENOENT, "Not found", name)
    error.winerror = number  # type: ignore[attr-defined]
    run_script(failing(error), [])
    said = capsys.readouterr().err
    assert said.endswith("a shorter path, or turn on long paths in Windows\n") == says
    assert ("that exists" in said) != says


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


def test_a_line_that_cannot_be_printed_is_an_error_at_the_end(logger, capsys):
    """A full disk under the log costs its lines, not the run."""

    def write(line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def main(argv):
        install_logging(write)
        logger.info("step 1")
        logger.info("step 2")
        return 0

    assert run_script(main, []) == 1
    said = capsys.readouterr().err
    assert said == "error: standard output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("setting", ["default", "always", "error"])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS, ids=lambda sampler: sampler.name)
def test_numpys_warnings_of_diffusers_samplers_reach_nobody(sampler, setting, capsys):
    """On Python 3.12 they are shown, here with python -W."""

    def main(argv):
        scheduler = denoise.make_sampler(DDPMScheduler(), sampler)
        scheduler.set_timesteps(3)
        sample = torch.zeros(1, 4, 8, 8)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample, timestep, sample).prev_sample
        return 0

    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter(setting)
        assert run_script(main, []) == 0
    assert [str(warning.message) for warning in caught if "__array" in str(warning.message)] == []
    assert "__array" not in capsys.readouterr().err


# Output that nobody reads


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), "Connection reset"),
        (TimeoutError(errno.ETIMEDOUT, "Timed out"), "Timed out"),
        (OSError(errno.EINVAL, "Invalid argument"), "Invalid argument"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_without_a_file_gets_no_remedy_about_disks(capsys, error, line):
    assert run_script(failing(error), []) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


class Gone(io.StringIO):
    """A stream whose reader is gone."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    flush = write  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET])
def test_a_run_continues_when_nobody_reads_its_output(monkeypatch, logger, name, number):
    gone = Gone(number)
    monkeypatch.setattr(gone, "flush", lambda: gone.write(""))
    monkeypatch.setattr(sys, name, gone)
    done = []

    def main(argv):
        install_logging(tqdm.write)
        for _ in tqdm(range(3), mininterval=0):
            logger.info("logged")
            print("printed")
            print("error", file=sys.stderr, flush=True)
            done.append(1)
        return 0

    assert run_script(main, []) == 0
    assert len(done) == 3


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["none", "closed"])
def test_a_run_without_output_at_all(monkeypatch, logger, name, kind):
    stream = None
    if kind == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, name, stream)

    def main(argv):
        install_logging(tqdm.write)
        for _ in tqdm(range(3), mininterval=0):
            logger.info("logged")
            print("error", file=sys.stderr)
        return 0

    assert run_script(main, []) == 0


def test_a_full_disk_under_stderr_stops_nothing(monkeypatch):
    gone = Gone(errno.ENOSPC)
    monkeypatch.setattr(gone, "flush", lambda: gone.write(""))
    monkeypatch.setattr(sys, "stderr", gone)
    assert run_script(lambda argv: print("error", file=sys.stderr) or 0, []) == 0


def test_the_streams_come_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        run_script(failing(SystemExit(2)), [])
    assert (sys.stdout, sys.stderr) == before


SCRIPT = """
import contextlib, os, sys
from tqdm import tqdm
from megaman.console import install_logging
from megaman.errors import run_script
import logging
def main(argv):
    install_logging(tqdm.write)
    log = logging.getLogger("megaman.x")
    for number in tqdm(range(2000), mininterval=0):
        log.info("line %d", number)
    with open("result", "wb") as file:
        for descriptor in (1, 2):  # as a library does
            with contextlib.suppress(OSError):
                os.write(descriptor, b"directly")
        file.write(b"whole")
    if argv:
        print("help")
        raise SystemExit(0)
    return 0
sys.exit(run_script(main, sys.argv[1:]))
"""
SHELL_ENDINGS = ["| head -1", "2>&1 | head -1", "2>&1 >/dev/null | head -c 9", ">&-", "2>&-"]
SHELL_ENDINGS += [">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "| true", "2>&1 | true"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell and /dev/full")
@pytest.mark.parametrize("words", ["", "--help"])
@pytest.mark.parametrize("ending", SHELL_ENDINGS)
def test_in_a_shell(tmp_path, ending, words):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = f"set -o pipefail; {sys.executable} script.py {words} {ending}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr and "Broken" not in done.stderr
    assert (tmp_path / "result").read_bytes() == b"whole"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk_is_reported_at_the_end(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe with a name")
def test_both_scripts_in_front_of_head(forked, base_folder, tmp_path):
    flags = "--num_validation_images 0 --max_train_steps 2 --target_modules to_q --output_dir out"
    data = f"--data_dir {ROOT / 'demo' / 'held_out'} --resolution 64"
    train = f"megaman_lora.py --pretrained_model_name {base_folder} {data} {flags}"
    generate = "generate_megaman.py --lora_path out/lora_weights"
    few = "--prompts robot --num_inference_steps 2 --output_dir images"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in (train, f"{generate} {few}"):
        with subprocess.Popen(["head", "-1", pipe], stdout=subprocess.PIPE, text=True) as head:
            run = forked.start(command.split(), tmp_path, pipe=pipe)
            line, _ = head.communicate(timeout=60)  # it has ended before the run writes the rest
            assert line.count("\n") == 1
            assert run.wait() == 0
    assert (tmp_path / "out" / "lora_weights" / "megaman_lora.safetensors").is_file()
    assert len(list((tmp_path / "images").glob("*.png"))) >= 1

"""A folder belongs to one run at a time, and to nobody once that has ended."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from megaman import locks
from megaman.errors import UserError
from megaman.locks import LOCK, claim, is_first_process

HOLD = """
import os, sys, time
from pathlib import Path
from megaman.locks import claim
with claim(Path(sys.argv[1]), "--output_dir"):
    if len(sys.argv) > 2 and os.fork():  # a worker outlives its run: it says when it has begun
        time.sleep(60)
    print("claimed", flush=True)
    time.sleep(60)
"""


class Msvcrt:
    """The module of this name, as far as locks.py uses it; the lock is of the whole file."""

    LK_NBLCK = 2

    @staticmethod
    def locking(file: int, mode: int, count: int) -> None:
        assert (mode, count) == (Msvcrt.LK_NBLCK, 1)
        assert os.lseek(file, 0, os.SEEK_CUR) == locks.LOCKED_BYTE
        locks.fcntl.flock(file, locks.fcntl.LOCK_EX | locks.fcntl.LOCK_NB)


@pytest.fixture
def holder():
    """holder(folder): a process that holds the claim on a folder."""
    started: list[subprocess.Popen[str]] = []

    def hold(folder: Path, *more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *more],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        return process

    yield hold
    for process in started:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_run_is_refused_by_name_until_the_first_is_killed(holder, tmp_path):
    folder = tmp_path / "out"
    process = holder(folder)
    with (
        pytest.raises(UserError, match=rf"--output_dir .*out is in use .*process {process.pid} on"),
        claim(folder, "--output_dir"),
    ):
        pass
    process.kill()
    process.wait()
    with claim(folder, "--output_dir"):
        assert str(os.getpid()) in (folder / LOCK).read_text(encoding="utf-8")
    assert not folder.exists() or os.listdir(folder) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_claim(holder, tmp_path):
    process = holder(tmp_path, "fork")
    process.kill()
    process.wait()
    with claim(tmp_path, "--output_dir"):
        pass


def test_in_one_process_as_in_two(tmp_path):
    """As in a notebook, where an exception may have ended the first run."""
    for _ in range(2):
        with pytest.raises(KeyError), claim(tmp_path, "--output_dir"):
            with pytest.raises(UserError), claim(tmp_path, "--output_dir"):
                pass
            raise KeyError


@pytest.mark.skipif(os.name != "posix", reason="Windows wants a right for links")
def test_another_name_of_the_same_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with claim(tmp_path / "out", "--output_dir"):
        with pytest.raises(UserError), claim(tmp_path / "link", "--output_dir"):
            pass
        with claim(tmp_path / "other", "--output_dir"):
            pass


def test_nothing_is_left_behind(tmp_path):
    with claim(tmp_path / "new" / "out", "--output_dir"):
        pass
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with claim(tmp_path / "mine", "--output_dir"):
        pass
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == []
    with claim(tmp_path / "new" / "out", "--output_dir"):
        (tmp_path / "new" / "file").touch()
    assert os.listdir(tmp_path / "new") == ["file"]


def test_the_file_of_a_killed_run_is_no_obstacle(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on another machine", encoding="utf-8")
    with claim(tmp_path, "--output_dir"):
        pass


@pytest.mark.parametrize("owner", [b"", b"\xff\0\x1b[31m", b"two\nlines", b"a" * 10_000])
def test_the_message_is_a_line_whatever_the_file_says(tmp_path, owner):
    with claim(tmp_path, "--output_dir"):
        (tmp_path / LOCK).write_bytes(owner)
        with pytest.raises(UserError) as caught, claim(tmp_path, "--output_dir"):
            pass
    assert str(caught.value).isprintable() and len(caught.value.message) < 400


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_drive_without_locks_stops_no_run(tmp_path, monkeypatch, number):
    def refuse(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_try_lock", refuse)
    with claim(tmp_path, "--output_dir"), claim(tmp_path, "--output_dir"):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path, monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_open", refuse)
    with claim(tmp_path, "--output_dir"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="deletes a file that is open")
def test_a_claim_that_was_just_given_up_is_not_taken_for_one(tmp_path, monkeypatch):
    """The first run deletes its file after the second has opened it."""
    real, opened = locks._try_lock, []

    def lock(file):
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / LOCK).unlink()
        real(file)

    monkeypatch.setattr(locks, "_try_lock", lock)
    with claim(tmp_path, "--output_dir"):
        monkeypatch.undo()
        with pytest.raises(UserError), claim(tmp_path, "--output_dir"):
            pass


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1"}, False),
        ({"RANK": "3", "WORLD_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, True),
        ({"SLURM_PROCID": "1"}, True),  # that starts independent runs
    ],
)
def test_one_process_of_a_run_claims(environment, first):
    assert is_first_process(environment) is first


def test_the_other_processes_of_a_run_trust_it(tmp_path, monkeypatch):
    with claim(tmp_path, "--output_dir"):
        monkeypatch.setenv("RANK", "1")
        with claim(tmp_path, "--output_dir"):
            assert os.listdir(tmp_path) == [LOCK]
        assert os.listdir(tmp_path) == [LOCK]


def test_two_runs_at_once_and_what_needs_no_claim(forked, pictures, base_folder, tmp_path):
    """Both begin together; one trains, the other is refused in a line."""
    words = ["--pretrained_model_name", base_folder, "--data_dir", pictures, "--resolution", 64]
    words += ["--max_train_steps", 2, "--num_validation_images", 0, "--output_dir", "out"]
    command = ["megaman_lora.py", *words, "--target_modules", "to_q", "--cache_dir", "cache"]
    runs = [forked.start(command, tmp_path) for _ in range(2)]
    deadline = time.monotonic() + 300
    while all(run.poll() is None for run in runs) and time.monotonic() < deadline:
        time.sleep(0.01)
    (refused,) = [run for run in runs if run.returncode == 1]
    (trained,) = [run for run in runs if run is not refused]
    trained.send_signal(signal.SIGSTOP)  # it has its folder for as long as the others look at it
    for more in ("--check_data", "--plan"):
        done = forked.run([*command, more], tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / LOCK).exists()
    trained.send_signal(signal.SIGCONT)
    said = refused.communicate()[1]
    assert said.count("\n") == 1 and said.startswith("error: --output_dir out is in use by another")
    assert trained.wait() == 0
    assert (tmp_path / "out" / "lora_weights").is_dir()
    assert not (tmp_path / "out" / LOCK).exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has the real one")
def test_on_windows_the_open_file_cannot_have_been_deleted(tmp_path, monkeypatch):
    """What os.stat and os.fstat say of one file there differs between versions of Python."""
    monkeypatch.setattr(locks, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(locks, "msvcrt", Msvcrt, raising=False)
    answers = iter([False, False])
    monkeypatch.setattr(os.path, "samestat", lambda *_: next(answers))
    with claim(tmp_path, "--output_dir"):
        with pytest.raises(UserError), claim(tmp_path, "--output_dir"):
            pass
        assert os.listdir(tmp_path) == [LOCK]
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="Windows wants a right for links")
def test_what_cannot_be_a_folder_is_named_with_its_flag(tmp_path):
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    said = r"^--output_dir .*lost is a link to nothing"
    with pytest.raises(UserError, match=said), claim(tmp_path / "lost", "--output_dir"):
        pass

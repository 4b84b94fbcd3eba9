"""The finished LoRA is saved, in the wanted folder or in the first other place that there is."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import FEW_TARGETS, ROOT

import megaman_lora
from megaman.errors import UserError
from megaman.training import questions
from megaman.training.output import choose_log_dir, save_somewhere
from megaman.training.tensorboard import TrainingLog


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "lora").write_text("", encoding="utf-8")


def no_place(*_):
    raise RuntimeError("Could not determine home directory.")


def no_folder(*_):
    raise FileNotFoundError(2, "No usable temporary directory found")


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """The current folder, the home folder and the one for temporary files."""
    folders = {name: tmp_path / name for name in ("cwd", "home", "tmp")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.chdir(folders["cwd"])
    monkeypatch.setenv("HOME", str(folders["home"]))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folders["tmp"]))
    return folders


@pytest.fixture
def blocked(tmp_path) -> Path:
    """A wanted folder that cannot be made."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    return tmp_path / "file" / "lora_weights"


def test_the_wanted_folder_is_tried_before_any_other_place_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "cwd", no_folder)
    monkeypatch.setattr(Path, "home", no_place)
    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    assert save_somewhere(tmp_path / "lora_weights", write) == (tmp_path / "lora_weights", "")


def test_the_places_in_their_order(places, blocked, monkeypatch):
    for name, find_place, error in (
        ("cwd", (Path, "cwd"), no_folder),  # a current folder that was deleted
        ("home", (Path, "home"), no_place),  # a user without an entry in /etc/passwd
        ("tmp", (tempfile, "gettempdir"), no_folder),
    ):
        folder, reason = save_somewhere(blocked, write)
        assert folder.parent == places[name] and folder.name.startswith("megaman_lora_rescued_")
        assert reason == "Not a directory"
        monkeypatch.setattr(*find_place, error)
    with pytest.raises(UserError, match=r"neither in .* nor elsewhere \(Not a directory\)"):
        save_somewhere(blocked, write)


@pytest.mark.parametrize("home", ["/nowhere/at/all", "/dev/null", "relative", "."])
def test_a_home_folder_that_is_none_is_skipped(places, blocked, monkeypatch, home):
    monkeypatch.setattr(Path, "cwd", no_folder)
    monkeypatch.setenv("HOME", home)
    folder, _ = save_somewhere(blocked, write)
    assert folder.parent == places["tmp"]
    assert not os.path.exists("/nowhere")


def test_a_place_that_cannot_be_written_is_skipped(places, blocked):
    def save(folder: Path) -> None:
        if folder.parent == places["cwd"]:
            raise PermissionError(13, "Permission denied", str(folder))
        write(folder)

    folder, reason = save_somewhere(blocked, save)
    assert folder.parent == places["home"] and reason == "Not a directory"


def test_two_runs_of_one_second_do_not_replace_each_other(places, blocked, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20261128-120000")
    folders = [save_somewhere(blocked, write)[0].name for _ in range(3)]
    name = "megaman_lora_rescued_20261128-120000"
    assert folders == [name, f"{name}-2", f"{name}-3"]


def test_any_number_of_log_folders_of_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20261128-120000")
    names = set()
    for _ in range(120):
        names.add(choose_log_dir(None, str(tmp_path / "logs"), tmp_path / "out").name)
    assert len(names) == 120


def test_a_log_that_cannot_be_closed_is_no_reason_to_lose_the_lora():
    class Writer:
        def flush(self) -> None:
            pass

        def add_scalar(self, *args) -> None:
            pass

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    log = TrainingLog(lambda purge_step: Writer(), None)
    log.add("add_scalar", "train/loss", 1.0, 1)
    log.close()


def test_a_run_without_any_home_saves_its_lora(train_here, tmp_path, monkeypatch):
    """As in a container whose user has no entry in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user], raising=False)
    data = ROOT / "demo" / "held_out"
    train_here(tmp_path, "out", "--data_dir", data, *FEW_TARGETS, "--max_train_steps", 1)
    assert not (tmp_path / "~").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows does not delete a current folder")
def test_training_leaves_a_deleted_folder_before_it_loads_torch(tmp_path, monkeypatch, capsys):
    # By name it would be imported in the deleted folder, where Python 3.13.0 raises SystemError.
    monkeypatch.setattr(questions, "answer", lambda config: [os.getcwd()])
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    assert megaman_lora.main(["--plan"]) == 0
    assert capsys.readouterr().out == f"{os.sep}\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows does not delete a current folder")
def test_generation_leaves_a_deleted_folder_before_it_loads_torch(tmp_path):
    """MKL would end the process there, with exit code 2."""
    (tmp_path / "deleted").mkdir()
    words = [
        sys.executable,
        ROOT / "generate_megaman.py",
        "--demo",
        "--device",
        "mps",
        "--output_dir",
    ]
    words += [tmp_path / "out", "--lora_path", ROOT / "tests" / "scripts" / "checkpoint-2"]
    command = f"cd deleted && rmdir ../deleted && exec {shlex.join(map(str, words))}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr.startswith("error: --device mps: this torch sees no such device")
    assert done.returncode == 1

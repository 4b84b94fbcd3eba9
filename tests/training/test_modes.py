"""Every file that a run writes can be read by whom the umask lets read it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import FEW_TARGETS
from safetensors.torch import save_file

from megaman.data.latent_cache import LatentCache
from megaman.files import replacing, replacing_folder, write_json

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
UMASKS = [0o022, 0o002, 0o027, 0o000, 0o077]


@pytest.fixture(params=UMASKS, ids=[f"{umask:03o}" for umask in UMASKS])
def umask(request):
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def modes(folder: Path) -> dict[str, int]:
    """The mode of each file and folder by its path."""
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


def expected(folder: Path, umask: int) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): (0o777 if path.is_dir() else 0o666) & ~umask
        for path in sorted(folder.rglob("*"))
    }


def test_files_that_libraries_make_private(umask, tmp_path):
    with replacing(tmp_path / "a.safetensors") as aside:
        save_file({"a": torch.ones(2)}, aside)
    with replacing_folder(tmp_path / "lora_weights") as aside:
        (aside / "text_encoder").mkdir()
        save_file({"a": torch.ones(2)}, aside / "text_encoder" / "a.safetensors")
        write_json(aside / "a.json", {})
    LatentCache(tmp_path / "cache").add({"key": torch.zeros(8, 2, 2)})
    found = modes(tmp_path)
    assert len(found) == 7 and found == expected(tmp_path, umask)


def test_a_file_that_replaces_another_has_the_mode_of_new_ones(umask, tmp_path):
    path = tmp_path / "a.safetensors"
    path.touch(0o600)
    with replacing(path) as aside:
        save_file({"a": torch.ones(2)}, aside)
    assert modes(tmp_path) == {"a.safetensors": 0o666 & ~umask}


def test_a_disk_without_modes_costs_no_file(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with replacing(tmp_path / "a.safetensors") as aside:
        save_file({"a": torch.ones(2)}, aside)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    """Not even for a moment: other threads make files, too."""
    monkeypatch.setattr(os, "umask", lambda mode: pytest.fail("the umask was changed"))
    with replacing(tmp_path / "a.safetensors") as aside:
        save_file({"a": torch.ones(2)}, aside)


@pytest.mark.parametrize("umask", [0o002], indirect=True, ids=["002"])
def test_everything_that_a_run_leaves(umask, train_here, tmp_path, pictures):
    flags = ["--max_train_steps", 2, "--save_steps", 1, "--num_validation_images", 1]
    more = ["--cache_dir", tmp_path / "cache", "--train_text_encoder", "--save_precision", "fp16"]
    made = set(tmp_path.rglob("*"))
    train_here(tmp_path, "out", "--data_dir", pictures, *FEW_TARGETS, *flags, *more)
    new = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - made}
    assert len([name for name in new if name.endswith(".safetensors")]) >= 10
    wrong = {
        name: f"{mode:o}"
        for name, mode in modes(tmp_path).items()
        if name in new and mode != expected(tmp_path, umask)[name]
    }
    assert wrong == {}

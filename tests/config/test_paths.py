"""Every flag with a path reads ~ as the home folder and reports blanks around a path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaman.config import current_folder, values
from megaman.config.cli import flags_of
from megaman.config.generate import GenerateConfig, parse_generate_config
from megaman.config.image_settings import CacheConfig
from megaman.config.settings import TrainConfig
from megaman.config.train import parse_train_config

PATHS = {
    parse_train_config: [
        "pretrained_model_name",
        "data_dir",
        "class_data_dir",
        "validation_data_dir",
        "validation_prompts_file",
        "auto_caption",
        "cache_dir",
        "output_dir",
        "logging_dir",
        "resume_from_checkpoint",
        "network_weights",
    ],
    parse_generate_config: [
        "base_model",
        "lora_path",
        "compare",
        "output_dir",
        "prompts_file",
        "checkpoints",
        "from_image",
    ],
}
CONFIGS = {parse_train_config: TrainConfig, parse_generate_config: GenerateConfig}
FLAGS = [(parse, flag) for parse, flags in PATHS.items() for flag in flags]
every_flag = pytest.mark.parametrize(
    ("parse", "flag"), FLAGS, ids=[f"{parse.__name__}-{flag}" for parse, flag in FLAGS]
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def read(parse, flag: str, value: str) -> str:
    result = parse([f"--{flag}={value}"]).settings()[flag]
    return result[0] if isinstance(result, list) else result


def refusal(parse, flag: str, value: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        parse([f"--{flag}", value])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: --{flag}: ")
    return error


def test_no_flag_with_a_path_is_forgotten():
    for parse, config in CONFIGS.items():
        parsers = (values.path, values.path_or_name, values.folder, values.lora)
        flags = flags_of(config)
        found = [name for name in flags if flags[name].metadata["flag"].type in parsers]
        found.remove("config")  # which is opened at once
        assert sorted(found) == sorted(PATHS[parse])
        for name in flags:
            words = ("dir", "path", "file", "folder", "checkpoints", "model")
            if any(word in name for word in words) and "limit" not in name:
                # clip_model has to be there, which values.model_folder checks.
                others = ("target_modules", "prompts_file", "clip_model")
                assert name in PATHS[parse] or name in others


@every_flag
def test_the_home_folder(parse, flag, home):
    assert read(parse, flag, "~/x") == f"{home}/x"
    assert read(parse, flag, "~/a b/洛克人") == f"{home}/a b/洛克人"
    assert read(parse, flag, "./~") == "./~", "as written: somebody means that"
    assert read(parse, flag, "x/~/y") == "x/~/y"


@pytest.mark.skipif(os.name != "posix", reason="Windows knows no other users' folders")
@every_flag
def test_the_home_folder_of_another_user(parse, flag, capsys):
    pwd = pytest.importorskip("pwd")
    root = pwd.getpwnam("root").pw_dir
    assert read(parse, flag, "~root/x") == f"{root}/x"
    assert "no user is called 'nobody-here'" in refusal(parse, flag, "~nobody-here/x", capsys)
    Path("~$old").mkdir()
    assert read(parse, flag, "~$old") == "~$old", "which exists"


@pytest.mark.skipif(os.name != "posix", reason="Windows always has a home folder")
@every_flag
def test_without_a_home_folder_none_is_made(parse, flag, monkeypatch, capsys):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for value in ("~", "~/x"):
        assert "there is no home folder" in refusal(parse, flag, value, capsys)
    Path("~").mkdir()
    assert "there is no home folder" in refusal(parse, flag, "~/x", capsys)


@pytest.mark.parametrize(
    "blank", [" ", "\t", "\n", "\u00a0", "\u3000", "\u202a", "\ufeff", "\u200b"]
)
@every_flag
def test_a_blank_in_front_or_behind_gets_a_line(parse, flag, blank, capsys):
    for value in (f"{blank}x", f"x{blank}", f"{blank}~/x"):
        assert "begins or ends with a blank: remove it" in refusal(parse, flag, value, capsys)


@pytest.mark.skipif(os.name != "posix", reason="Windows drops blanks at the end")
@every_flag
def test_a_file_with_such_a_name_is_meant(parse, flag):
    for name in ("x ", " y", "a b"):
        Path(name).touch()
        assert read(parse, flag, name) == name


@pytest.fixture
def deleted(tmp_path) -> None:
    """The current folder has been deleted."""
    folder = tmp_path / "deleted"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()


@pytest.mark.skipif(os.name != "posix", reason="Windows does not delete a current folder")
@every_flag
def test_in_a_deleted_folder_only_whole_paths_lead_somewhere(
    parse, flag, tmp_path, deleted, capsys
):
    is_name = flags_of(CONFIGS[parse])[flag].metadata["flag"].type is values.path_or_name
    for value in ("x", "./x", "../x"):
        if not is_name:
            assert "current folder, which has been deleted" in refusal(parse, flag, value, capsys)
    places = {"data_dir": tmp_path / "in", "output_dir": tmp_path, "logging_dir": tmp_path}
    places |= {"lora_path": tmp_path, flag: f"{tmp_path}/x"}
    known = flags_of(CONFIGS[parse])
    words = [f"--{name}={place}" for name, place in places.items() if name in known]
    excluded = "lora_path" if flag in ("from_image", "compare", "checkpoints") else "no flag"
    parse([word for word in words if excluded not in word])


@pytest.mark.skipif(os.name != "posix", reason="Windows does not delete a current folder")
def test_a_default_in_a_deleted_folder_is_refused_if_it_is_needed(deleted, capsys):
    def refused(parse, *words: str) -> list[str]:
        try:
            parse(words)
        except SystemExit as ended:
            assert ended.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert all("the default, is relative to the current folder" in line for line in lines)
        return [line.split()[1] for line in lines]

    train, generate = parse_train_config, parse_generate_config
    assert refused(train) == ["--data_dir", "--output_dir", "--logging_dir"]
    assert refused(train, "--demo", "--output_dir=/x") == ["--logging_dir"]
    assert refused(train, "--demo", "--output_dir=/x", "--logging_dir=/x") == []
    assert refused(train, "--plan") == []
    assert refused(train, "--system_info", "--output_dir=/x") == ["--logging_dir"]
    assert refused(train, "--check_data", "--data_dir=/x") == ["--output_dir"]
    assert refused(generate) == ["--output_dir", "--lora_path"]
    assert refused(generate, "--compare=/x", "--output_dir=/x") == []
    assert refused(generate, "--checkpoints=/x", "--output_dir=/x") == []
    assert refused(generate, "--from_image=/x") == ["--output_dir"]
    current_folder.leave_deleted_folder()
    assert os.getcwd() == os.sep
    assert refused(train) == []


def test_a_loras_strength_stays_behind_its_path(home, capsys):
    config = parse_generate_config(["--lora_path", "~/a:0.5", "b:-1", "~/c"])
    assert config.model.lora_path == (f"{home}/a:0.5", "b:-1", f"{home}/c")
    (home / "d:1").touch()
    assert parse_generate_config(["--lora_path", "~/d:1"]).model.lora_path == (f"{home}/d:1",)
    assert "begins or ends" in refusal(parse_generate_config, "lora_path", "x :0.5", capsys)


def test_the_caches_folder_as_well(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    assert CacheConfig().path() == home / "caches" / "megaman_lora"

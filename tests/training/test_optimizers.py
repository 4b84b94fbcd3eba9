"""--optimizer: each steps, and resumes bit for bit from a checkpoint without pickles."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from megaman.config.learning_settings import OPTIMIZERS, OptimizerConfig
from megaman.config.presets import PRESETS
from megaman.config.train import parse_train_config
from megaman.errors import UserError
from megaman.training import optimizer_state, optimizers
from megaman.training.optimizers import LIBRARIES, create_optimizer

CPU = torch.device("cpu")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Parameters as a LoRA has them: B is zero, a convolution has another memory format, one is
    large enough for 8 bits."""
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name].name)
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(4, 32),
        "b": torch.zeros(32, 4),
        "conv": torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last),
        "large": torch.randn(80, 80, 1, 1).to(memory_format=torch.channels_last),
    }
    parameters = {key: nn.Parameter(tensor) for key, tensor in tensors.items()}
    lr = 1.0 if name == "prodigy" else 1e-2
    config = OptimizerConfig(optimizer=name, learning_rate=lr)
    return parameters, create_optimizer(config, [{"params": [*parameters.values()], "lr": lr}], CPU)


def distance(parameters: dict[str, nn.Parameter]) -> torch.Tensor:
    """From a fixed target."""
    parts = [(parameter - 0.5).square().mean() for parameter in parameters.values()]
    return torch.stack(parts).sum()


def take_steps(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range
) -> None:
    for step in steps:
        (distance(parameters) * (1 + step % 3)).backward()
        optimizer.step()
        optimizer.zero_grad()


@every_optimizer
def test_a_resumed_optimizer_steps_bit_for_bit_alike(name, tmp_path):
    parameters, optimizer = make(name)
    before = distance(parameters)
    take_steps(parameters, optimizer, range(6))
    optimizer_state.save(tmp_path, parameters, optimizer)
    halfway = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    take_steps(parameters, optimizer, range(6, 12))
    assert distance(parameters) < before

    resumed, again = make(name)
    for key, parameter in resumed.items():
        parameter.data.copy_(halfway[key])
    optimizer_state.restore(tmp_path, optimizer_state.read(tmp_path), resumed, again)
    take_steps(resumed, again, range(6, 12))
    assert all(resumed[key].equal(parameter) for key, parameter in parameters.items())
    files = {path.name for path in tmp_path.iterdir()}
    numbers = set() if name == "adamw" else {"optimizer.json"}
    assert files == {"optimizer.safetensors", *numbers}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"steps": {}, "groups": []}', "missing"])
@pytest.mark.parametrize("name", ["prodigy", "adamw8bit"])
def test_damaged_numbers_end_in_a_line(name, content, tmp_path):
    parameters, optimizer = make(name)
    take_steps(parameters, optimizer, range(2))
    optimizer_state.save(tmp_path, parameters, optimizer)
    path = tmp_path / optimizer_state.NUMBERS
    path.unlink()
    if content != "missing":
        path.write_text(content, encoding="utf-8")
    parameters, optimizer = make(name)
    with pytest.raises(UserError, match="optimizer"):
        optimizer_state.restore(tmp_path, optimizer_state.read(tmp_path), parameters, optimizer)


def test_the_state_of_another_optimizer_does_not_fit(tmp_path):
    parameters, optimizer = make("prodigy")
    take_steps(parameters, optimizer, range(2))
    optimizer_state.save(tmp_path, parameters, optimizer)
    numbers = json.loads((tmp_path / optimizer_state.NUMBERS).read_text(encoding="utf-8"))
    assert numbers["groups"] == [
        {key: float(optimizer.param_groups[0][key]) for key in optimizer_state.GROUP_NUMBERS}
    ]
    other_parameters, other = make("adamw")
    with pytest.raises(UserError, match="does not fit its adapter"):
        saved = optimizer_state.read(tmp_path)
        optimizer_state.restore(tmp_path, saved, other_parameters, other)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_prodigy_takes_a_rate_of_1_unless_one_is_typed(preset):
    argv = ["--optimizer", "prodigy", *(["--preset", preset] if preset else [])]
    assert parse_train_config(argv).optimizer.learning_rate == 1
    assert parse_train_config([*argv, "--learning_rate", "0.5"]).optimizer.learning_rate == 0.5


def test_a_low_rate_for_prodigy_gets_a_line(caplog, capsys):
    pytest.importorskip("prodigyopt")
    caplog.set_level(logging.INFO)
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 1e-4}]
    create_optimizer(OptimizerConfig(optimizer="prodigy", learning_rate=1e-4), groups, CPU)
    assert "--learning_rate 0.0001 is a factor on the rate that Prodigy finds" in caplog.text
    assert "decoupled" not in capsys.readouterr().out, "the library prints"


def test_prodigy_has_one_rate_for_both_models(capsys):
    argv = ["--optimizer", "prodigy", "--train_text_encoder"]
    assert parse_train_config(argv).optimizer.text_encoder_lr == 1
    with pytest.raises(SystemExit):
        parse_train_config([*argv, "--text_encoder_lr", "0.5"])
    assert "omit --text_encoder_lr" in capsys.readouterr().err


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as refused:
        optimizers.require_library(name)
    library = LIBRARIES[name]
    assert str(refused.value).startswith(f"--optimizer {name} needs the package {library.name}")
    assert f"pip install {library.name}=={library.version}" in str(refused.value.remedy)
    optimizers.require_library("adamw")


def test_the_extras_are_the_libraries_versions():
    import tomllib

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    versions = {name: [f"{library.name}=={library.version}"] for name, library in LIBRARIES.items()}
    assert extras == versions

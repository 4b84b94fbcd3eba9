"""What a command line or an image's record decides before torch is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaman.config.generate import parse_generate_config
from megaman.config.presets import DEMO
from megaman.errors import UserError
from megaman.files import split_strength
from megaman.hub import DEFAULT_BASE
from megaman.sampling.plan import GenerationPlan
from megaman.sampling.prompts import Prompt

BASE = str(DEMO / "base")


@pytest.fixture
def lora(tmp_path):
    """A LoRA's folder as training leaves it, for a base on the hub; its files are empty."""
    folder = tmp_path / "lora_weights"
    folder.mkdir()
    config = {"base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name in ("megaman_lora", "pytorch_lora_weights", "other"):
        (folder / f"{name}.safetensors").touch()
    return folder


def plan_of(*words) -> GenerationPlan:
    config = parse_generate_config([str(word) for word in words])
    loras = [(Path(name), 1.0) for name, _ in map(split_strength, config.model.lora_path)]
    return GenerationPlan.from_config(config, [Prompt("a robot")], loras)


@pytest.mark.parametrize(
    ("name", "flags", "base"),
    [
        ("", [], "some/base"),
        ("megaman_lora.safetensors", [], "some/base"),
        ("pytorch_lora_weights.safetensors", [], "some/base"),
        ("other.safetensors", [], DEFAULT_BASE),
        ("", ["--demo"], BASE),
        ("megaman_lora.safetensors", ["--demo"], BASE),
        ("other.safetensors", ["--demo"], BASE),
        ("other.safetensors", ["--demo", "--base_model", "a/b"], "a/b"),
        ("", ["--base_model", "a/b"], "a/b"),
    ],
)
def test_the_base_is_the_flags_or_the_demos_or_the_loras(lora, name, flags, base):
    assert plan_of("--lora_path", lora / name, *flags).base == base


def test_the_first_lora_that_names_a_base_decides(lora):
    assert plan_of("--lora_path", lora / "other.safetensors", f"{lora}:0.5").base == "some/base"


@pytest.mark.parametrize("flags", [[], ["--demo"], ["--base_model", "a/b"]], ids=" ".join)
def test_a_missing_lora_is_reported_before_a_base_is_loaded(lora, flags):
    with pytest.raises(UserError, match=r"no LoRA at .*nothing"):
        plan_of("--lora_path", lora, lora.parent / "nothing", *flags)

"""adapter_config.json: what a LoRA's folder says of itself, believed as far as its tensors bear it
out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.errors import UserError
from megaman.files import read_json
from megaman.hub import is_base
from megaman.safe_loading import conversion, refuse_pickle

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# All that is taken from the file. PEFT knows keys by which it would import and download what they
# name.
KEYS = ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern")
HIGHEST_RANK, HIGHEST_ALPHA = 4096, 65536
MOST_NAMES = 2000  # Stable Diffusion has some 300 layers that can have a LoRA
# What PEFT reads as a regular expression has to be a module's name, so that none can run for ever.
MODULE_NAME = re.compile(r"\^?[\w.\\]{1,200}\$?", flags=re.ASCII)
ANOTHER = "Name another LoRA folder in --lora_path"


def read(folder: Path) -> dict[str, Any]:
    """The file's content; raises UserError where the folder holds no LoRA."""
    if not folder.is_dir():
        raise UserError(
            f"There is no LoRA at {folder}",
            "Train one with megaman_lora.py, or name another in --lora_path",
        )
    if not (folder / PEFT_CONFIG).is_file():
        raise UserError(
            f"{folder} holds no {PEFT_CONFIG}, so it is no LoRA folder",
            "Name a lora_weights folder in --lora_path",
        )
    content = read_json(folder / PEFT_CONFIG)
    if not isinstance(content, dict):
        raise UserError(f"{folder / PEFT_CONFIG} is damaged", ANOTHER)
    return content


def find(path: Path) -> Path:
    """Where a LoRA's tensors are told of: a folder with adapter_config.json, or a .safetensors file
    of another program.

    A folder without that file stands for the only LoRA in it, or for the one that diffusers would
    take. Raises UserError for a file of another kind, and where there are several LoRAs to choose
    from.
    """
    if path.is_file():
        refuse_pickle(path, conversion(path))
        if path.suffix.lower() != ".safetensors":
            raise UserError(
                f"{path} is a file, but no .safetensors",
                "Name a LoRA's file or folder in --lora_path",
            )
        return path
    if not path.is_dir() or (path / PEFT_CONFIG).is_file():
        return path
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return path / DIFFUSERS_WEIGHTS
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise UserError(
            f"{path} holds several LoRAs ({names})", "Name one of its files in --lora_path"
        )
    return files[0] if files else path


def base_of(folder: Path) -> str | None:
    """The base that the LoRA was trained on, where its folder says so; a file says nothing that
    could be loaded.

    Raises UserError where no LoRA is there, or where the base is neither here nor named like one on
    the hub: the LoRA may be a stranger's.
    """
    if find(folder).is_file():
        return None
    name = read(folder).get("base_model_name_or_path")
    if name in (None, ""):
        return None
    if not isinstance(name, str) or not is_base(name):
        short = repr(name) if len(repr(name)) < 200 else f"{repr(name)[:200]}..."
        raise UserError(
            f"{folder / PEFT_CONFIG} names {short} as its base, which is nothing on this machine nor a name on the hub",
            "Name the base in --base_model",
        )
    return name


def validate(folder: Path, content: dict[str, Any], ranks: set[int]) -> dict[str, Any]:
    """What LoraConfig is to be told, given the ranks that the tensors have; raises UserError where
    they disagree."""
    patterns = {name: content.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    values = {"peft_type": "LORA", "use_rslora": False, **content, **patterns}

    def is_known_rank(value: Any) -> bool:
        return type(value) is int and value in ranks

    def is_rank(value: Any) -> bool:
        return _is_rank(value) and (value in ranks or bool(patterns["rank_pattern"]))

    checks = {
        "peft_type": schema.one_of("LORA"),
        "r": is_rank,
        "lora_alpha": _is_strength,
        "target_modules": schema.list_of(_is_module, least=1, most=MOST_NAMES),
        "use_rslora": schema.instance(bool),
        "rank_pattern": schema.mapping(is_known_rank, _is_module, MOST_NAMES),
        "alpha_pattern": schema.mapping(_is_strength, _is_module, MOST_NAMES),
    }
    if wrong := schema.first_invalid(values, checks):
        raise UserError(
            f"{folder / PEFT_CONFIG}: {wrong} is not what a LoRA with these tensors can have",
            ANOTHER,
        )
    return {key: content[key] for key in KEYS if content.get(key)}


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and MODULE_NAME.fullmatch(value) is not None


_is_rank = schema.whole(1, HIGHEST_RANK)
_is_strength = schema.number(0, HIGHEST_ALPHA, exclusive=True)

"""adapter_config.json, trusted only as far as the LoRA's tensors confirm it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.errors import UserError
from megaman.files import read_json
from megaman.hub import is_base
from megaman.safe_loading import conversion, refuse_pickle

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHTS = "megaman_lora.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
# The keys that are used. Ranks and target modules are those of the tensors, so that no pattern of a
# stranger is compiled. PEFT has other keys by which it would import and download what they name.
KEYS = ("r", "lora_alpha", "use_rslora", "alpha_pattern")
MAX_RANK, MAX_ALPHA = 4096, 65536
MAX_NAMES = 2000  # Stable Diffusion has about 300 layers that can have a LoRA
# PEFT reads these as regular expressions; only module names are allowed, which match fast.
MODULE_NAME = re.compile(r"\^?[\w.\\]{1,200}\$?", flags=re.ASCII)
PEFT_PARTS = ("unet", "text_encoder")  # which PEFT's names begin with if it was around both
PART_OF_KEY = re.compile(rf"\^?(?P<part>{'|'.join(PEFT_PARTS)})\\?\.")  # in alpha_pattern
REMEDY = "Name another LoRA folder in --lora_path"


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's adapter_config.json; raises UserError if there is no LoRA."""
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
        raise UserError(f"{folder / PEFT_CONFIG} is damaged", REMEDY)
    return content


def find(path: Path) -> Path:
    """The LoRA at a path: a folder with adapter_config.json, or a .safetensors file.

    For PEFT's file in such a folder it is the folder. In a folder without adapter_config.json it
    is diffusers' file, or the only file. Raises UserError for a file of another kind, and for a
    folder with several LoRAs.
    """
    if path.is_file():
        refuse_pickle(path, conversion(path))
        if path.suffix.lower() != ".safetensors":
            raise UserError(
                f"{path} is not a .safetensors file",
                "Name a LoRA's file or folder in --lora_path",
            )
        is_peft = path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file()
        return path.parent if is_peft else path
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


def require(path: Path) -> None:
    """Raise UserError if there is no LoRA at a path, without reading its tensors."""
    found = find(path)
    if not found.is_file():
        read(found)


def base_of(path: Path) -> str | None:
    """The name of the base that the LoRA was trained on, if its folder has one.

    For one of the files that training writes it is that of its folder; None for other files.
    Raises UserError if there is no LoRA, or if the base, which a stranger may have named, is
    neither on this machine nor a name on the hub.
    """
    found = find(path)
    folder = found.parent if found.is_file() else found
    if found.is_file():
        is_ours = found.name in (KOHYA_WEIGHTS, DIFFUSERS_WEIGHTS)
        if not is_ours or not (folder / PEFT_CONFIG).is_file():
            return None
    name = read(folder).get("base_model_name_or_path")
    if name in (None, ""):
        return None
    if not isinstance(name, str) or not is_base(name):
        short = repr(name) if len(repr(name)) < 200 else f"{repr(name)[:200]}..."
        raise UserError(
            f"{folder / PEFT_CONFIG} names {short} as its base, "
            "which is neither on this machine nor a name on the hub",
            "Name the base in --base_model",
        )
    return name


def require_lora_type(folder: Path, content: dict[str, Any]) -> None:
    """Raise UserError, naming what it is, if a configuration is that of another adapter."""
    kind = content.get("peft_type", "LORA")
    if isinstance(kind, str) and kind != "LORA":
        raise UserError(
            f"{folder / PEFT_CONFIG}: peft_type is not LORA but {kind[:30]!r}: it is no plain LoRA",
            REMEDY,
        )


def for_part(content: dict[str, Any], part: str) -> dict[str, Any]:
    """A configuration with the alphas of a part, unet or text_encoder, by its own layers' names:
    where PEFT was around several models, theirs begin with the part (see formats.split_peft)."""
    pattern = content.get("alpha_pattern")
    if not isinstance(pattern, dict):
        return content
    alphas = {}
    for key, alpha in pattern.items():
        named = PART_OF_KEY.match(key) if isinstance(key, str) else None
        if named is None:
            alphas[key] = alpha
        elif named["part"] == part:
            alphas[key[named.end() :]] = alpha
    return {**content, "alpha_pattern": alphas}


def validate(folder: Path, content: dict[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The arguments for LoraConfig, for tensors of these ranks by layer.

    Ranks and target modules are those of the tensors, whatever the configuration says of them.
    Raises UserError if the rest is not valid.
    """
    has_pattern = isinstance(content.get("rank_pattern"), dict) and bool(content["rank_pattern"])
    alpha_pattern = content.get("alpha_pattern") or {}
    rank = content.get("r")
    if isinstance(rank, float) and rank.is_integer():
        rank = int(rank)
    values = {
        "peft_type": "LORA",
        "use_rslora": False,
        **content,
        "r": rank,
        "alpha_pattern": alpha_pattern,
    }

    _require_names(folder, alpha_pattern)

    def is_rank(value: Any) -> bool:
        return _is_rank(value) and (value in ranks.values() or has_pattern)

    checks = {
        "peft_type": schema.one_of("LORA"),
        "r": is_rank,
        "lora_alpha": _is_strength,
        "use_rslora": schema.instance(bool),
        "alpha_pattern": schema.mapping(_is_strength, _is_module, MAX_NAMES),
    }
    if invalid := schema.first_invalid(values, checks):
        raise UserError(
            f"{folder / PEFT_CONFIG}: {invalid} is not valid for a LoRA with these tensors",
            REMEDY,
        )
    return {
        **{key: values[key] for key in KEYS if values.get(key)},
        "target_modules": list(ranks),
        "rank_pattern": exact_pattern(ranks, rank),
    }


def _require_names(folder: Path, alpha_pattern: Any) -> None:
    """Raise UserError if a key is another regular expression than the name of a module."""
    for key in alpha_pattern if isinstance(alpha_pattern, dict) else ():
        if not _is_module(key):
            raise UserError(
                f"{folder / PEFT_CONFIG}: alpha_pattern is not by module names alone: "
                f"{key[:60]!r} is a regular expression, which a stranger may have written",
                "Replace it by the names of the modules that it stands for, "
                "or name the LoRA's file for A1111 or ComfyUI in --lora_path",
            )


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The values that differ from the default, by a regular expression for their layer alone."""
    return {f"^{re.escape(name)}$": value for name, value in values.items() if value != default}


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and MODULE_NAME.fullmatch(value) is not None


_is_rank = schema.whole(1, MAX_RANK)
_is_strength = schema.number(0, MAX_ALPHA, exclusive=True)

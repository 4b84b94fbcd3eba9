"""LoRA files in the three layouts that programs read, out of the trained models; and those of all
of them back in.

The keys of module M = down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q:

    PEFT        adapter_model.safetensors          base_model.model.M.lora_A.weight
    diffusers   pytorch_lora_weights.safetensors   unet.M.lora_A.weight
    kohya       megaman_lora.safetensors           lora_unet_M_with_underscores.lora_down.weight

Alpha travels in adapter_config.json, in the header's lora_adapter_metadata, and as an .alpha tensor
a module. A text encoder's LoRA has its own PEFT folder, text_encoder/ in the other; the two files
hold both.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from megaman.errors import UserError
from megaman.files import replacing_folder, write_json
from megaman.lora import formats as lora_formats
from megaman.lora import peft_config
from megaman.lora.adapter import ADAPTER, adapter_name, get_lora_config, set_scales
from megaman.lora.peft_config import DIFFUSERS_WEIGHTS, PEFT_CONFIG
from megaman.safe_loading import check_safetensors

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

PEFT_WEIGHTS = "adapter_model.safetensors"
TEXT_ENCODER = "text_encoder"  # the part, and its folder
PEFT_PREFIX = "base_model.model."
# Readers older than diffusers 0.42 need the text_model. that transformers 5 dropped; newer ones
# take both.
DIFFUSERS_PREFIXES = {"unet": "unet.", TEXT_ENCODER: "text_encoder.text_model."}
PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA's tensors on the CPU under PEFT's bare names: M.lora_A.weight, M.lora_B.weight."""
    # PEFT would look for the text encoder's configuration, on the hub if need be, to see whether
    # its words are new
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; its library's error where the disk is full or closed becomes a
    UserError."""
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be written ({error})", "Free some space or choose another folder"
        ) from None


def write_peft(
    folder: Path,
    unet: UNet2DConditionModel,
    base_name: str,
    precision: str = "float",
    text_encoder: CLIPTextModel | None = None,
) -> None:
    """Write PEFT's two files into an existing folder, and a text encoder's LoRA into text_encoder/
    in it."""
    for part, model in _models(unet, text_encoder).items():
        place = folder if part == "unet" else folder / part
        place.mkdir(exist_ok=True)
        state = {
            PEFT_PREFIX + name: tensor.to(PRECISIONS[precision])
            for name, tensor in adapter_state(model).items()
        }
        write_tensors(place / PEFT_WEIGHTS, state, {"format": "pt"})
        write_json(
            place / PEFT_CONFIG, {**config_dict(model), "base_model_name_or_path": base_name}
        )


def save_lora(
    folder: Path,
    unet: UNet2DConditionModel,
    base_name: str,
    notes: Mapping[str, str],
    precision: str = "float",
    others: Mapping[str, bytes] = MappingProxyType({}),
    text_encoder: CLIPTextModel | None = None,
) -> None:
    """Write lora_weights/: all three layouts, the folder replaced in one step.

    notes are strings for the kohya file's header, such as ss_steps; precision is a key of
    PRECISIONS; others are the names and contents of further files, such as the model card;
    text_encoder is given where it has a LoRA too.
    """
    models = _models(unet, text_encoder)
    states = {
        part: {
            name: tensor.to(PRECISIONS[precision]) for name, tensor in adapter_state(model).items()
        }
        for part, model in models.items()
    }
    with replacing_folder(folder) as aside:
        write_peft(aside, unet, base_name, precision, text_encoder)
        metadata = {
            f"{part}.{key}": value
            for part, model in models.items()
            # diffusers loads dropout in training mode and would then draw with it
            for key, value in {**config_dict(model), "lora_dropout": 0.0}.items()
        }
        write_tensors(
            aside / DIFFUSERS_WEIGHTS,
            {
                DIFFUSERS_PREFIXES[part] + name: tensor
                for part in states
                for name, tensor in states[part].items()
            },
            {
                "format": "pt",
                "lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True),
            },
        )
        tensors = lora_formats.to_kohya(states, models)
        header = {
            **lora_formats.header(unet, tensors, base_name),
            **notes,
            **lora_formats.hashes(tensors),
        }
        write_tensors(aside / lora_formats.WEIGHTS, tensors, header)
        for name, content in others.items():
            (aside / name).write_bytes(content)


def _models(unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None) -> dict[str, nn.Module]:
    return {"unet": unet} | ({TEXT_ENCODER: text_encoder} if text_encoder else {})


def config_dict(model: nn.Module) -> dict[str, Any]:
    """PEFT's configuration as JSON holds it: sets become sorted lists. transformers notes where it
    found its model, which is a path on this machine and nobody's business."""
    content = {**get_lora_config(model).to_dict(), "base_model_name_or_path": None}
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in content.items()
    }


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file that may be anybody's; raises UserError where it is not sound or a
    number not finite."""
    check_safetensors(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be loaded ({error})", "Take a checkpoint, or train again"
        ) from None
    for name, tensor in tensors.items():
        if name.endswith(".alpha") and not tensor.is_complex():  # kohya's may be whole numbers
            tensor = tensors[name] = tensor.float()
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise UserError(
                f"{path}: {name[:200]!r} holds numbers that are not finite",
                "Take an earlier checkpoint",
            )
    return tensors


def short_hash(path: Path) -> str:
    """The twelve digits by which A1111 knows a LoRA: of all that follows the header of its file, in
    a folder of the kohya file. A checkpoint has none; there they stand for PEFT's files."""
    found = peft_config.find(path)
    files = [found / lora_formats.WEIGHTS] if found.is_dir() else [found]
    if not files[0].is_file():
        files = list(
            filter(Path.is_file, (found / PEFT_WEIGHTS, found / TEXT_ENCODER / PEFT_WEIGHTS))
        )
    digest = hashlib.sha256()
    for content in map(Path.read_bytes, files):
        digest.update(content[8 + int.from_bytes(content[:8], "little") :])
    return digest.hexdigest()[:12]


def read_metadata(path: Path) -> dict[str, str]:
    """The header's metadata of a safetensors file that was checked before."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_lora(
    path: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel | None = None,
    adapter: str = ADAPTER,
) -> LoraConfig:
    """Put a LoRA into a UNet and, where it has a part for it, into a text encoder; returns its
    (first) configuration.

    path is a PEFT folder (lora_weights/ or a checkpoint), or a file in kohya's or diffusers' layout
    or the folder with it. Raises UserError where that is no LoRA, or one for another base.
    """
    found = peft_config.find(path)
    models = _models(unet, text_encoder)
    if found.is_file():
        tensors, metadata = read_tensors(found), read_metadata(found)
        lora_formats.refuse_foreign(path, metadata, tensors)
        parts = {}
        for part, (state, alphas) in lora_formats.to_peft(path, tensors, models).items():
            ranks = _check_shapes(found, state, models[part])
            told = None if alphas else lora_formats.config_from_header(metadata, part)
            known = (
                peft_config.validate(found, told, ranks)
                if told
                else lora_formats.config_from_tensors(state, alphas)
            )
            parts[part] = (known, state)
        if not parts:
            raise UserError(f"{found} holds no tensor", "Name another LoRA in --lora_path")
    else:
        parts = {"unet": _read_peft(found, unet)}
        if text_encoder and (found / TEXT_ENCODER).is_dir():
            parts[TEXT_ENCODER] = _read_peft(found / TEXT_ENCODER, text_encoder)
    configs = [
        _put_in(path, models[part], LoraConfig(**known), state, adapter)
        for part, (known, state) in parts.items()
    ]
    return configs[0]


def _read_peft(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What LoraConfig is to be told and the tensors under their bare names, both found to fit the
    model."""
    content = peft_config.read(folder)
    tensors = read_tensors(folder / PEFT_WEIGHTS)
    lora_formats.refuse_foreign(folder, {}, tensors)
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    return peft_config.validate(folder, content, _check_shapes(folder, state, model)), state


def load_loras(
    loras: Sequence[tuple[Path, float]], unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> list[LoraConfig]:
    """The same with several LoRAs, all at work together, each at its strength: 1 is the trained
    one."""
    configs = [
        load_lora(path, unet, text_encoder, adapter_name(number))
        for number, (path, _) in enumerate(loras)
    ]
    set_scales(
        [unet, text_encoder], {number: strength for number, (_, strength) in enumerate(loras)}
    )
    return configs


def _put_in(
    path: Path, model: nn.Module, config: LoraConfig, state: dict[str, torch.Tensor], adapter: str
) -> LoraConfig:
    try:
        with warnings.catch_warnings():  # PEFT remarks on a second LoRA, which is meant
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            model.add_adapter(config, adapter_name=adapter)
    except ValueError as error:
        reason = str(error).split(". ")[0][:200]
        raise UserError(
            f"The LoRA in {path} does not fit this base ({reason})",
            "Name its own base in --base_model",
        ) from None
    restore(model, state, adapter)
    return config


def restore(model: nn.Module, state: dict[str, torch.Tensor], adapter: str = ADAPTER) -> None:
    """Set the tensors of the LoRA already in the model; PEFT's names, bare or with their prefix."""
    bare = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()}
    try:
        outcome = set_peft_model_state_dict(model, bare, adapter_name=adapter)
    except RuntimeError:
        raise UserError(
            "The LoRA's tensors do not fit its own configuration",
            "Take a checkpoint, or train again",
        ) from None
    unknown = list(getattr(outcome, "unexpected_keys", []))
    absent = [
        key for key in getattr(outcome, "missing_keys", []) if key.endswith(f".{adapter}.weight")
    ]
    if unknown or absent:
        raise UserError(
            f"The LoRA does not fit this base ({(unknown + absent)[0]})",
            "Name its own base in --base_model",
        )


def _check_shapes(folder: Path, state: dict[str, torch.Tensor], model: nn.Module) -> set[int]:
    """Compare each pair A, B with the layer it is for, before anything is changed; returns their
    ranks."""
    layers = dict(model.named_modules())
    ranks = set()
    for module in {name.partition(".lora_")[0]: None for name in state}:
        weight = getattr(layers.get(module), "weight", None)
        down, up = (state.get(f"{module}.lora_{side}.weight") for side in "AB")
        fits = (
            isinstance(weight, torch.Tensor)
            and weight.ndim >= 2
            and down is not None
            and up is not None
        )
        if (
            not fits
            or down.shape[1:] != weight.shape[1:]
            or up.shape[:2] != (weight.shape[0], *down.shape[:1])
        ):
            raise UserError(
                f"The LoRA in {folder} was made for another base ({module[:200]!r} differs)",
                "Name its own base in --base_model",
            )
        ranks.add(len(down))
    if not ranks:
        raise UserError(
            f"{folder / PEFT_WEIGHTS} holds no tensor", "Name another LoRA folder in --lora_path"
        )
    return ranks

"""LoRA files of untrusted origin into models: PEFT's folders, and files in diffusers' and kohya's
layouts (lora.saving has their keys)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from megaman.errors import UserError
from megaman.lora import formats as lora_formats
from megaman.lora import peft_config
from megaman.lora.adapter import ADAPTER, adapter_name, set_scales
from megaman.lora.formats import PEFT_PREFIX
from megaman.lora.peft_config import KOHYA_WEIGHTS, PEFT_WEIGHTS
from megaman.safe_loading import check_safetensors

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

TEXT_ENCODER = "text_encoder"  # the model, and its folder
Tensors = dict[str, torch.Tensor]


def models_by_part(unet: nn.Module, text_encoder: nn.Module | None = None) -> dict[str, nn.Module]:
    """The models as the functions here take them: "unet", and "text_encoder" if there is one."""
    models = {"unet": unet}
    if text_encoder is not None:
        models[TEXT_ENCODER] = text_encoder
    return models


def read_tensors(path: Path, allow_bytes: bool = False) -> Tensors:
    """Read an untrusted safetensors file; raises UserError if it is damaged or not finite, if it
    has whole numbers other than bytes that are allowed, or if such numbers show another adapter."""
    check_safetensors(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be loaded ({error})", "Take a checkpoint, or train again"
        ) from None
    for name, tensor in tensors.items():
        if name.startswith(lora_formats.EMBEDDINGS):
            continue  # not used
        if allow_bytes and tensor.dtype == torch.uint8:
            continue
        if name.endswith(".alpha") and not tensor.is_complex():  # kohya's may be whole numbers
            tensor = tensors[name] = tensor.float()
        if not tensor.is_floating_point():
            lora_formats.refuse_other_adapter(path, name)
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {name[:200]!r} holds {kind}, not floating-point numbers",
                "Take an earlier checkpoint, or name another LoRA",
            )
        if not tensor.float().isfinite().all():
            raise UserError(
                f"{path}: {name[:200]!r} holds numbers that are not finite",
                "Take an earlier checkpoint",
            )
    return tensors


def short_hash(path: Path) -> str:
    """The first twelve digits of a LoRA's hash in A1111, of all that follows its file's header.

    For a folder it is that of the kohya file, and for a checkpoint, which has none, one of PEFT's
    files.
    """
    found = peft_config.find(path)
    files = [found / KOHYA_WEIGHTS] if found.is_dir() else [found]
    if not files[0].is_file():
        weights = (found / PEFT_WEIGHTS, found / TEXT_ENCODER / PEFT_WEIGHTS)
        files = [file for file in weights if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(content[8 + int.from_bytes(content[:8], "little") :])
    return digest.hexdigest()[:12]


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file that has been checked."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


class LoraTensors(NamedTuple):
    """A LoRA for one model: LoraConfig's arguments, and the tensors under PEFT's bare names."""

    config: dict[str, Any]
    state: Tensors


def read_lora(path: Path, models: Mapping[str, nn.Module]) -> tuple[dict[str, LoraTensors], bool]:
    """The LoRAs at a path for these models, by part, and whether it has one for another.

    path is as for `load_lora`. Raises UserError if there is no LoRA, or one for another base.
    """
    found = peft_config.find(path)
    if found.is_file():
        tensors, metadata = _read_checked(path, found)
        tensors, others = lora_formats.for_parts(path, tensors, models)
        return _adapters(path, found, tensors, metadata, models), bool(others)
    adapters, others = _read_folder(found, models)
    return adapters, bool(others)


def load_lora(
    path: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel | None = None,
    adapter: str = ADAPTER,
) -> LoraConfig:
    """Load a LoRA into a UNet and, if it has tensors for it, into a text encoder.

    path is a PEFT folder (lora_weights/ or a checkpoint), or a file in kohya's or diffusers' layout
    or the folder with it. Returns the LoRA's first configuration. Raises UserError if there is no
    LoRA, or one for another base.
    """
    models = models_by_part(unet, text_encoder)
    found = peft_config.find(path)
    is_file = found.is_file()
    adapters = _read_file(path, found, models) if is_file else _read_folder(found, models)[0]
    configs = []
    for part, (arguments, state) in adapters.items():
        config = LoraConfig(**arguments)
        _add_adapter(path, models[part], config, adapter)
        restore(models[part], state, adapter)
        configs.append(config)
    return configs[0]


def _read_file(path: Path, file: Path, models: Mapping[str, nn.Module]) -> dict[str, LoraTensors]:
    """The adapters in a file in kohya's or diffusers' layout, by model; checked against it."""
    tensors, metadata = _read_checked(path, file)
    return _adapters(path, file, tensors, metadata, models)


def _read_checked(path: Path, file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file's layers and its metadata; raises UserError for another model's."""
    tensors, metadata = read_tensors(file), read_metadata(file)
    lora_formats.refuse_foreign(path, metadata, tensors)
    return lora_formats.without_extras(path, tensors), metadata


def _adapters(
    path: Path,
    file: Path,
    tensors: Tensors,
    metadata: Mapping[str, str],
    models: Mapping[str, nn.Module],
) -> dict[str, LoraTensors]:
    adapters = {}
    for part, (state, alphas) in lora_formats.to_peft(path, tensors, models).items():
        ranks = _check_shapes(file, state, models[part])
        config = None if alphas else lora_formats.config_from_header(metadata, part)
        if config:
            config = peft_config.validate(file, config, ranks)
        else:
            config = lora_formats.config_from_tensors(state, alphas)
        adapters[part] = LoraTensors(config, state)
    if not adapters:
        raise UserError(f"{file} holds no tensor of a LoRA", "Name another in --lora_path")
    return adapters


def _read_folder(
    folder: Path, models: Mapping[str, nn.Module]
) -> tuple[dict[str, LoraTensors], set[str]]:
    """The adapters in a PEFT folder, by model and checked against it, and the parts of those for
    other models."""
    tensors = _read_peft(folder, "unet")
    places = dict.fromkeys(tensors, folder)
    if (folder / TEXT_ENCODER).is_dir():
        places[TEXT_ENCODER] = folder / TEXT_ENCODER
        if TEXT_ENCODER in models:
            tensors |= _read_peft(folder / TEXT_ENCODER, TEXT_ENCODER)
    adapters = {
        part: _peft_adapter(places[part], part, tensors[part], model)
        for part, model in models.items()
        if part in tensors
    }
    if not adapters:
        raise UserError(
            f"{folder / PEFT_WEIGHTS} holds no tensor", "Name another LoRA folder in --lora_path"
        )
    return adapters, places.keys() - models.keys()


def _read_peft(folder: Path, part: str) -> dict[str, Tensors]:
    """The tensors of a PEFT folder by part; those whose names do not say theirs are of this one."""
    peft_config.require_lora_type(folder, peft_config.read(folder))
    tensors = read_tensors(folder / PEFT_WEIGHTS)
    lora_formats.refuse_foreign(folder, {}, tensors)
    return lora_formats.split_peft(lora_formats.without_extras(folder, tensors), part)


def _peft_adapter(folder: Path, part: str, tensors: Tensors, model: nn.Module) -> LoraTensors:
    state = lora_formats.from_peft(folder, tensors, model)
    ranks = _check_shapes(folder, state, model)
    config = peft_config.for_part(peft_config.read(folder), part)
    return LoraTensors(peft_config.validate(folder, config, ranks), state)


def load_loras(
    loras: Sequence[tuple[Path, float]], unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> list[LoraConfig]:
    """Load several LoRAs, all active, each at its scale: 1 is the trained strength."""
    configs = [
        load_lora(path, unet, text_encoder, adapter_name(index))
        for index, (path, _) in enumerate(loras)
    ]
    scales = {index: scale for index, (_, scale) in enumerate(loras)}
    set_scales([unet, text_encoder], scales)
    return configs


def _add_adapter(path: Path, model: nn.Module, config: LoraConfig, adapter: str) -> None:
    try:
        with warnings.catch_warnings():  # PEFT warns of a second LoRA, which is intended
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            cast(Any, model).add_adapter(config, adapter_name=adapter)
    except ValueError as error:
        reason = str(error).split(". ")[0][:200]
        raise UserError(
            f"The LoRA in {path} does not fit this base ({reason})",
            "Name its own base in --base_model",
        ) from None


def restore(model: nn.Module, state: Tensors, adapter: str = ADAPTER) -> None:
    """Set the tensors of a LoRA that the model has, under PEFT's names, bare or prefixed."""
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


def _check_shapes(folder: Path, state: Tensors, model: nn.Module) -> dict[str, int]:
    """The rank of each layer of a LoRA.

    Raises UserError if a pair A, B does not fit its layer in the model.
    """
    layers = dict(model.named_modules())
    modules = dict.fromkeys(name.partition(".lora_")[0] for name in state)
    ranks = {}
    for module in modules:
        weight = getattr(layers.get(module), "weight", None)
        a, b = (state.get(f"{module}.lora_{side}.weight") for side in "AB")
        if not isinstance(weight, torch.Tensor) or a is None or not _fits(weight, a, b):
            raise UserError(
                f"The LoRA in {folder} was made for another base ({module[:200]!r} differs)",
                "Name its own base in --base_model",
            )
        ranks[module] = len(a)
    if not ranks:
        raise UserError(
            f"{folder / PEFT_WEIGHTS} holds no tensor", "Name another LoRA folder in --lora_path"
        )
    return ranks


def _fits(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None) -> bool:
    """Whether A [rank, in, ...] and B [out, rank, ...] have the sizes of W [out, in, ...]."""
    if weight.ndim < 2 or b is None or a.shape[1:] != weight.shape[1:]:
        return False
    return b.shape[:2] == (weight.shape[0], *a.shape[:1])

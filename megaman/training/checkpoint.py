"""checkpoint-N/: everything that a resumed run needs, tensors as safetensors and the rest as JSON.
It is a LoRA folder, too.

Order, crops, noise and timesteps depend on the run's seed and the sample indices (batches.py), so
no random state has to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaman import schema
from megaman.data.captions import CaptionAugmentation
from megaman.errors import UserError
from megaman.files import read_json, replacing_folder, write_json
from megaman.lora import adapter as lora
from megaman.lora import files as lora_files
from megaman.models.configs import resolve_name
from megaman.training import optimizer_state
from megaman.training.history import HISTORY, RunHistory
from megaman.training.output import STATE

if TYPE_CHECKING:
    from megaman.config.train import TrainConfig
    from megaman.training.adapters import Adapters
    from megaman.training.datasets import Datasets

# The settings of checkpoints from before these existed.
EARLIER_SETTINGS: dict[str, Any] = {
    "train_text_encoder": False,
    "enable_bucket": False,
    "no_cache": False,
    "class data": "none",
    "optimizer": "adamw",
    "upscale": "lanczos",
    "background": "#ffffff",
    "alpha_mask": False,
    "base_precision": "same",
    **CaptionAugmentation()._asdict(),
}


@dataclass
class TrainState:
    """What a checkpoint holds in addition to tensors.

    step counts optimizer steps, elapsed seconds. settings has what a resumed run has to share;
    choices how it was computed (compute.to_record), which a resumed run may share (None in early
    checkpoints); scaler the state of fp16's loss scaler.
    """

    step: int
    seed: int
    log_dir: str | None
    elapsed: float
    settings: dict[str, Any]
    choices: Any = None
    scaler: dict[str, Any] | None = None


def save(
    folder: Path,
    adapters: Adapters,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    history: RunHistory | None = None,
) -> None:
    """Write a checkpoint; the folder appears complete or not at all."""
    with replacing_folder(folder) as aside:
        models = lora_files.models_by_part(adapters.unet, adapters.text_encoder)
        lora_files.write_peft(aside, models, adapters.base_name, adapters.notes)
        optimizer_state.save(aside, _parameters(adapters), optimizer)
        if history is not None:
            history.save(aside / HISTORY)
        write_json(aside / STATE, asdict(state))


def _parameters(adapters: Adapters) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters under their names in the optimizer's file."""
    parameters = lora.parameters(adapters.unet)
    if adapters.text_encoder is not None:
        for name, parameter in lora.parameters(adapters.text_encoder).items():
            parameters[f"{lora_files.TEXT_ENCODER}.{name}"] = parameter
    return parameters


def read_train_state(folder: Path) -> TrainState:
    """The state in a checkpoint; raises UserError if it is incomplete or invalid."""
    content = read_json(folder / STATE)
    if not _is_train_state(content):
        raise UserError(f"{folder / STATE} is damaged", "Resume from an earlier checkpoint")
    return TrainState(**{field.name: content.get(field.name) for field in fields(TrainState)})


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e30


_is_train_state = schema.record(
    {
        "step": schema.instance(int),
        "seed": schema.instance(int),
        "elapsed": _is_finite,
        "settings": schema.instance(dict),
    },
    optional={
        "log_dir": schema.instance(str, type(None)),
        "scaler": lambda value: not value or schema.mapping(_is_finite)(value),
    },
)


def restore(folder: Path, adapters: Adapters, optimizer: torch.optim.Optimizer) -> None:
    """Load the checkpoint's tensors into the adapters and the optimizer.

    Raises UserError if a file is missing or damaged, or does not fit.
    """
    folders: dict[Path, torch.nn.Module] = {folder: adapters.unet}
    if adapters.text_encoder is not None:
        folders[folder / lora_files.TEXT_ENCODER] = adapters.text_encoder
    try:
        states = [lora_files.read_tensors(path / lora_files.PEFT_WEIGHTS) for path in folders]
        saved = optimizer_state.read(folder)
    except (OSError, UserError) as error:
        raise UserError(
            f"{folder} is damaged ({error})", "Resume from an earlier checkpoint"
        ) from None
    for model, state in zip(folders.values(), states, strict=True):
        lora_files.restore(model, state)
    optimizer_state.restore(folder, saved, _parameters(adapters), optimizer)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The settings in which a checkpoint and this run differ, in words."""
    saved = {**EARLIER_SETTINGS, **saved}
    return [
        f"{key} was {saved[key]} and is now {current[key]}"
        for key in current
        if key in saved and saved[key] != current[key]
    ]


def shared_settings(
    config: TrainConfig, datasets: Datasets, seed: int, world_size: int
) -> dict[str, Any]:
    """What a resumed run has to share; a checkpoint stores it."""
    images = config.optimizer.train_batch_size * world_size
    class_images = datasets.class_images
    return {
        "pretrained_model_name": resolve_name(config.base.pretrained_model_name),
        "seed": seed,
        "data": datasets.images.fingerprint(),
        "class data": "none" if class_images is None else class_images.fingerprint(),
        **config.resume_settings(),
        # Not the flag: auto without pixel art is what earlier runs did.
        "upscale": "; ".join(dataset.upscale_summary() for dataset in datasets.all),
        "pictures a step": images * config.optimizer.gradient_accumulation_steps,
        "pictures of one bucket": images if config.buckets.enable_bucket else None,
    }

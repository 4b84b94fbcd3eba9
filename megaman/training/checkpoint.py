"""checkpoint-N/: everything that a resumed run needs, tensors as safetensors and the rest as JSON.
It is a LoRA folder, too.

Order, crops, noise and timesteps depend on the run's seed and the sample indices (batches.py), so
no random state has to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megaman import schema
from megaman.data.captions import CaptionAugmentation
from megaman.data.crops import LANCZOS
from megaman.data.dataset_summary import fingerprint, upscale_summary
from megaman.errors import UserError
from megaman.files import read_json, replacing_folder, write_json
from megaman.lora import adapter as lora
from megaman.lora import files as lora_files
from megaman.lora import saving
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
    "upscale": LANCZOS,
    "background": "#ffffff",
    "alpha_mask": False,
    "base_precision": "same",
    "use_ema": False,
    **CaptionAugmentation()._asdict(),
}


@dataclass
class TrainState:
    """What a checkpoint holds in addition to tensors.

    step counts optimizer steps, elapsed seconds. settings has what a resumed run has to share;
    choices how it was computed (compute.to_record), which a resumed run may share (None in early
    checkpoints); scaler the state of fp16's loss scaler. held_out names the images that are held
    out; evaluation is Evaluator.record(). Both are None without such images. world_size is the
    number of processes for which the flags are meant, None in early checkpoints.
    """

    step: int
    seed: int
    log_dir: str | None
    elapsed: float
    settings: dict[str, Any]
    choices: Any = None
    scaler: dict[str, Any] | None = None
    held_out: list[str] | None = None
    evaluation: dict[str, Any] | None = None
    world_size: int | None = None


class CheckpointSource(Protocol):
    """What the evaluator adds to a checkpoint: the adapters, its record as JSON, and tensors by
    file."""

    adapters: Adapters

    def record(self) -> dict[str, Any] | None:
        """TrainState.evaluation."""
        ...

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors by the names of files and parameters."""
        ...


def save(
    folder: Path,
    adapters: Adapters,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    history: RunHistory | None = None,
    files: Mapping[str, lora_files.Tensors] = MappingProxyType({}),
) -> None:
    """Write a checkpoint, with more files of tensors by name; the folder appears complete or not at
    all."""
    with replacing_folder(folder) as aside:
        models = lora_files.models_by_part(adapters.unet, adapters.text_encoder)
        saving.write_peft(aside, models, adapters.base_name, adapters.notes())
        optimizer_state.save(aside, named_parameters(adapters), optimizer)
        for name, tensors in files.items():
            saving.write_tensors(aside / name, _on_cpu(tensors))
        if history is not None:
            history.save(aside / HISTORY)
        write_json(aside / STATE, asdict(state))


def _on_cpu(tensors: lora_files.Tensors) -> lora_files.Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def named_parameters(adapters: Adapters) -> dict[str, torch.nn.Parameter]:
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


_is_best = schema.record(
    {
        "step": schema.whole(1, 10**12),
        "name": schema.one_of("held_out", "ema"),
        "loss": schema.number(0, 1e30),
    },
    exact=True,
)
_is_evaluation = schema.record(
    {
        "eval_steps": schema.whole(1, 10**12),
        "best": lambda value: value is None or _is_best(value),
    }
)
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
        "held_out": lambda value: value is None or schema.list_of(schema.text(10_000))(value),
        "evaluation": lambda value: value is None or _is_evaluation(value),
        "world_size": lambda value: value is None or schema.whole(1, 10**6)(value),
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
    optimizer_state.restore(folder, saved, named_parameters(adapters), optimizer)


def read_adapter(path: Path, parameters: Mapping[str, torch.nn.Parameter]) -> lora_files.Tensors:
    """The values in a checkpoint's file for these parameters.

    Raises UserError if it is missing or damaged, or does not fit.
    """
    try:
        tensors = lora_files.read_tensors(path)
    except (OSError, UserError) as error:
        raise UserError(
            f"{path} is damaged ({error})", "Resume from an earlier checkpoint"
        ) from None
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise UserError(f"{path} does not fit its adapter", "Resume from an earlier checkpoint")
    # What is read stays mapped to a file that may be deleted.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def require_same_settings(
    checkpoint: str, saved: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
    """Raise UserError if a run cannot resume from this checkpoint, since settings differ."""
    saved = {**EARLIER_SETTINGS, **saved}
    changed = _changed(saved, current)
    if not changed:
        return
    remedy = "Give the same settings to resume"
    if changed == ["upscale"]:
        remedy = _upscale_remedy(saved["upscale"])
    different = "; ".join(differences(saved, current))
    raise UserError(f"{checkpoint} is of another run: {different}", remedy)


def _upscale_remedy(saved: str) -> str:
    """What to do if images are enlarged in another way, perhaps since auto's rule has changed."""
    if set(saved.split("; ")) == {LANCZOS}:
        return "Add --upscale lanczos to resume"
    return (
        "Give the same --upscale to resume. If it is the same, an earlier version recognized other "
        "images as pixel art: begin a new run"
    )


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The settings in which a checkpoint and this run differ, in words."""
    saved = {**EARLIER_SETTINGS, **saved}
    return [f"{key} was {saved[key]} and is now {current[key]}" for key in _changed(saved, current)]


def _changed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The settings that both have, with other values."""
    return [key for key in current if key in saved and saved[key] != current[key]]


def shared_settings(
    config: TrainConfig, datasets: Datasets, seed: int, step_images: Mapping[str, int | None]
) -> dict[str, Any]:
    """What a resumed run has to share; a checkpoint stores it. step_images are
    StepImages.settings."""
    class_images, held_out = datasets.class_images, datasets.held_out
    return {
        "pretrained_model_name": resolve_name(config.base.pretrained_model_name),
        "seed": seed,
        "data": fingerprint(datasets.images),
        "class data": "none" if class_images is None else fingerprint(class_images),
        "held-out images": "none" if held_out is None else fingerprint(held_out),
        **config.resume_settings(),
        # Not the flag: auto without pixel art is what earlier runs did.
        "upscale": "; ".join(upscale_summary(dataset) for dataset in datasets.all),
        **step_images,
    }

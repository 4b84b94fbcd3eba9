"""checkpoint-N/: all that a resumed run needs, tensors as safetensors and the rest as JSON. It is a
LoRA folder too.

Order, crops, noise and timesteps hang on the run's seed and the pictures' numbers (batches.py), so
that no random state has to be kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaman import schema
from megaman.data.captions import CaptionAugmentation
from megaman.errors import UserError
from megaman.files import read_json, remove_folder, replacing_folder, write_json
from megaman.lora import adapter as lora
from megaman.lora import files as lora_files
from megaman.training.output import STATE, find_all, step_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

OPTIMIZER = "optimizer.safetensors"


@dataclass
class TrainState:
    """What a checkpoint holds in addition to tensors: optimizer steps done, the run's seed,
    TensorBoard folder, seconds spent, the settings that a resumed run has to share, those of
    compute.py, which it may (None in earlier checkpoints), and the loss scale's state if there is
    one."""

    step: int
    seed: int
    log_dir: str | None
    elapsed: float
    settings: dict[str, Any]
    choices: Any = None
    scaler: dict[str, Any] | None = None


def save(
    output_dir: Path,
    unet: UNet2DConditionModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    state: TrainState,
    base_name: str,
    limit: int | None,
    text_encoder: CLIPTextModel | None = None,
) -> Path:
    """Write output_dir/checkpoint-<step> in one step and then delete the oldest ones over the
    limit.

    text_encoder is given where it is trained too.
    """
    folder = output_dir / f"checkpoint-{state.step}"
    with replacing_folder(folder) as aside:
        lora_files.write_peft(aside, lora_files.models_by_part(unet, text_encoder), base_name)
        lora_files.write_tensors(
            aside / OPTIMIZER, _optimizer_tensors(_parameters(unet, text_encoder), optimizer)
        )
        whole_state = replace(state, scaler=scaler.state_dict() if scaler else None)
        write_json(aside / STATE, asdict(whole_state))
    prune(output_dir, state.step, limit)
    return folder


def prune(output_dir: Path, step: int, limit: int | None) -> None:
    """Delete the oldest checkpoints up to this step over the limit. Later ones, of a run that was
    taken up again from before them, are not this run's to delete."""
    if limit:
        for old in [path for path in find_all(output_dir) if step_of(path) <= step][:-limit]:
            remove_folder(old)


def _parameters(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None
) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters under the names that they have in the optimizer's file."""
    others = lora.parameters(text_encoder) if text_encoder else {}
    return lora.parameters(unet) | {
        f"{lora_files.TEXT_ENCODER}.{name}": value for name, value in others.items()
    }


def _optimizer_tensors(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """AdamW's averages and step counts under the parameters' names."""
    return {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def read_train_state(folder: Path) -> TrainState:
    """What the checkpoint says of its run; raises UserError if it does not say it all, or something
    else."""
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


def restore(
    folder: Path,
    unet: UNet2DConditionModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    text_encoder: CLIPTextModel | None = None,
) -> None:
    """Put the checkpoint's adapters, optimizer state and loss scale into those of this run."""
    places = {folder: unet} | (
        {folder / lora_files.TEXT_ENCODER: text_encoder} if text_encoder else {}
    )
    try:
        adapters = [lora_files.read_tensors(place / lora_files.PEFT_WEIGHTS) for place in places]
        moments = lora_files.read_tensors(folder / OPTIMIZER)
    except (OSError, UserError) as error:
        raise UserError(
            f"{folder} is damaged ({error})", "Resume from an earlier checkpoint"
        ) from None
    for model, adapter in zip(places.values(), adapters, strict=True):
        lora_files.restore(model, adapter)
    for name, parameter in _parameters(unet, text_encoder).items():
        keys = [key for key in moments if key.startswith(f"{name}:")]
        if any(moments[key].shape not in (parameter.shape, ()) for key in keys):
            raise UserError(
                f"{folder / OPTIMIZER} does not fit its adapter",
                "Resume from an earlier checkpoint",
            )
        fused = optimizer.defaults["fused"]
        optimizer.state[parameter] = {
            key.split(":")[1]: _beside(parameter, moments[key], fused) for key in keys
        }
    saved_scaler = read_train_state(folder).scaler
    if scaler and saved_scaler:
        scaler.load_state_dict(saved_scaler)


def _beside(parameter: torch.nn.Parameter, moment: torch.Tensor, fused: bool) -> torch.Tensor:
    """A copy of what AdamW keeps for the parameter, since what is read stays tied to a file that
    may be deleted.

    The averages lie in memory like the parameter: the fused AdamW goes through both by address,
    whatever their strides. The step count is on the CPU unless AdamW is fused.
    """
    if moment.ndim:
        return torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)
    return moment.to(parameter.device if fused else torch.device("cpu"), copy=True)


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Settings in which a checkpoint and this run disagree, as words."""
    # What earlier checkpoints do not tell.
    earlier = {
        "train_text_encoder": False,
        "enable_bucket": False,
        "no_cache": False,
        "class data": "none",
        **CaptionAugmentation()._asdict(),
    }
    saved = {**earlier, **saved}
    return [
        f"{key} was {saved[key]} and is now {wanted[key]}"
        for key in wanted
        if key in saved and saved[key] != wanted[key]
    ]

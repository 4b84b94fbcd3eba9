"""The LoRA itself: W = W0 + (alpha / rank) * B A on a model's layers (Hu et al. 2021, arXiv
2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from megaman.errors import WRONG_USAGE, UserError
from megaman.lora import forward as lora_forward

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

ADAPTER = "default"
# All of CLIP's linear layers, as in kohya's scripts; diffusers' example takes the first four.
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def inject(
    model: UNet2DConditionModel | CLIPTextModel,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    use_rslora: bool = False,
    dropout: float = 0.0,
) -> list[torch.nn.Parameter]:
    """Put a LoRA on every layer whose name ends in one of target_modules; returns its parameters,
    in float32.

    use_rslora scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732); dropout is the
    share of a layer's inputs that A does not see at a step.

    A starts random and B at zero, so that the model is unchanged until the first step. Raises
    UserError for a name that fits no layer, and for a layer that cannot carry a LoRA.
    """
    check_targets([name for name, _ in model.named_modules()], target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=list(target_modules),
        use_rslora=use_rslora,
        lora_dropout=dropout,
        init_lora_weights=True,
    )
    config._register_custom_module(lora_forward.FAST_LAYERS)
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(
            f"--target_modules: {str(error).split('. ')[0]}",
            "Name linear or convolution layers",
            WRONG_USAGE,
        ) from None
    trainable = list(parameters(model).values())
    for parameter in trainable:  # half-precision adapters learn slowly and end in NaN
        parameter.data = parameter.data.float()
    lora_forward.match_memory_format(model)
    return trainable


def check_targets(layers: Sequence[str], target_modules: Sequence[str]) -> None:
    """Raise UserError where no layer's name ends in one of target_modules."""
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(
                f"--target_modules {target}: the UNet has no such layer",
                "Try to_q or ff.net.2",
                WRONG_USAGE,
            )


def parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def adapter_name(number: int) -> str:
    """The name under which the LoRA with this number, from 0, is in the model."""
    return f"{ADAPTER}_{number}" if number else ADAPTER


def get_lora_config(model: torch.nn.Module) -> LoraConfig:
    """The configuration of the LoRA in the model."""
    return model.peft_config[ADAPTER]


def set_scales(models: Sequence[torch.nn.Module], strengths: Mapping[int, float]) -> None:
    """Have the LoRAs with these numbers at work in the models, each at its strength: a factor on
    its trained scale."""
    _set_scales(_layers(models), strengths)


def _set_scales(layers: Sequence[LoraLayer], strengths: Mapping[int, float]) -> None:
    named = {adapter_name(number): strength for number, strength in strengths.items()}
    for layer in layers:
        layer.set_adapter(list(named))
        for adapter, strength in named.items():
            layer.set_scale(adapter, strength)


class Fused:
    """The LoRAs added to the models' own weights, which draws faster; their layers leave the
    models.

    With changing the strengths may be set again: the own weights are kept on the CPU and put back
    each time, since to subtract what was added would leave its rounding behind.
    """

    def __init__(self, models: Sequence[torch.nn.Module], changing: bool):
        self._layers = _layers(models)
        weights = [layer.get_base_layer().weight for layer in self._layers] if changing else []
        self._own = [weight.detach().to("cpu", copy=True) for weight in weights]
        for model in models:
            recurse_remove_peft_layers(model)

    def set_scales(self, strengths: Mapping[int, float]) -> None:
        """Have the LoRAs with these numbers at work, each at its strength: a factor on its trained
        scale."""
        for layer, own in zip(self._layers, self._own, strict=False):
            layer.get_base_layer().weight.data.copy_(own)
            layer.merged_adapters.clear()
        _set_scales(self._layers, strengths)
        for layer in self._layers:
            layer.to(layer.get_base_layer().weight.device)
            layer.merge()


@contextmanager
def lora_disabled(*models: torch.nn.Module) -> Iterator[None]:
    """Within this the models are the plain base."""
    for layer in _layers(models):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in _layers(models):
            layer.enable_adapters(True)


def _layers(models: Sequence[torch.nn.Module]) -> list[LoraLayer]:
    return [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]

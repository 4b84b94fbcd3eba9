"""A LoRA in a model: W = W0 + (alpha / rank) * B A (Hu et al. 2021, arXiv 2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from megaman.errors import WRONG_USAGE, UserError
from megaman.lora import forward as lora_forward

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

ADAPTER = "default"
# All linear layers of CLIP, as in kohya's scripts; diffusers' example takes the first four.
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def inject(
    model: UNet2DConditionModel | CLIPTextModel,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    use_rslora: bool = False,
    dropout: float = 0.0,
) -> list[nn.Parameter]:
    """Add a LoRA to every layer whose name ends in one of target_modules.

    use_rslora scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732); dropout is the
    probability with which an input of A is zeroed in training. A starts random and B at zero, so
    that the model is unchanged before the first step.

    Returns the LoRA's parameters in float32: in half precision they learn slowly and end in NaN.
    Raises UserError if a name matches no layer, or a layer that cannot have a LoRA.
    """
    check_targets([name for name, _ in model.named_modules()], target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, int(alpha) if float(alpha).is_integer() else alpha),
        target_modules=list(target_modules),
        use_rslora=use_rslora,
        lora_dropout=dropout,
        init_lora_weights=True,
    )
    config._register_custom_module(lora_forward.FAST_LAYERS)
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise UserError(
            f"--target_modules: {reason}", "Name linear or convolution layers", WRONG_USAGE
        ) from None
    trainable = list(parameters(model).values())
    for parameter in trainable:
        parameter.data = parameter.data.float()
    lora_forward.match_memory_format(model)
    return trainable


def check_targets(layers: Sequence[str], target_modules: Sequence[str]) -> None:
    """Raise UserError if one of target_modules ends no layer's name."""
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(
                f"--target_modules {target}: the UNet has no such layer",
                "Try to_q or ff.net.2",
                WRONG_USAGE,
            )


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def adapter_name(index: int) -> str:
    """PEFT's name for the LoRA with this index."""
    return f"{ADAPTER}_{index}" if index else ADAPTER


def get_lora_config(model: nn.Module) -> LoraConfig:
    """The configuration of the LoRA in the model."""
    return cast("dict[str, LoraConfig]", model.peft_config)[ADAPTER]


def set_scales(models: Sequence[nn.Module], scales: Mapping[int, float]) -> None:
    """Activate the LoRAs with these indices, each at a factor on its trained alpha / rank."""
    _set_scales(_layers(models), scales)


def _set_scales(layers: Sequence[LoraLayer], scales: Mapping[int, float]) -> None:
    by_name = {adapter_name(index): scale for index, scale in scales.items()}
    for layer in layers:
        layer.set_adapter(list(by_name))
        for name, scale in by_name.items():
            layer.set_scale(name, scale)


class FusedLoras:
    """LoRAs merged into the models' weights, which samples faster; PEFT's layers are removed.

    If the scales are to change later (reversible), the original weights are kept on the CPU and
    the LoRAs are merged into a copy each time: subtracting them would leave rounding errors.
    Merging happens on the CPU wherever the models are, since a GPU rounds otherwise.
    """

    def __init__(self, models: Sequence[nn.Module], reversible: bool):
        self._layers = _layers(models)
        self._originals = _copy_weights(self._layers) if reversible else []
        for model in models:
            recurse_remove_peft_layers(model)

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Merge the LoRAs with these indices, each at a factor on its trained alpha / rank."""
        _set_scales(self._layers, scales)
        for i, layer in enumerate(self._layers):
            _merge(layer, self._originals[i] if self._originals else _base_weight(layer).data)


def _merge(layer: LoraLayer, original: torch.Tensor) -> None:
    """Set the layer's weight to the original with the active LoRAs merged into it, on the CPU."""
    base_layer = layer.get_base_layer()
    weight = cast(nn.Parameter, base_layer.weight)
    base_layer.weight = nn.Parameter(original.to("cpu", copy=True), requires_grad=False)
    layer.merged_adapters.clear()
    layer.merge()
    weight.data.copy_(_base_weight(layer).data)
    base_layer.weight = weight


@contextmanager
def lora_disabled(*models: nn.Module) -> Iterator[None]:
    """Within this context the models compute without their LoRAs."""
    for layer in _layers(models):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in _layers(models):
            layer.enable_adapters(True)


def _layers(models: Sequence[nn.Module]) -> list[LoraLayer]:
    modules = chain.from_iterable(model.modules() for model in models)
    return [module for module in modules if isinstance(module, LoraLayer)]


def _copy_weights(layers: Sequence[LoraLayer]) -> list[torch.Tensor]:
    return [_base_weight(layer).detach().to("cpu", copy=True) for layer in layers]


def _base_weight(layer: LoraLayer) -> torch.Tensor:
    return cast(torch.Tensor, layer.get_base_layer().weight)

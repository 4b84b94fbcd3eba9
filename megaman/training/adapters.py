"""The models in training, each with its LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from megaman.lora import adapter
from megaman.lora.files import models_by_part
from megaman.models.float8 import store_in_float8
from megaman.models.typed import move
from megaman.models.weights import CPU
from megaman.training.compute import TrainingCompute, prepare_unet
from megaman.training.memory_saving import checkpoint_gradients
from megaman.training.network_weights import FirstWeights

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from megaman.config.learning_settings import LoraConfig
    from megaman.models.base import Base


@dataclass(frozen=True)
class Adapters:
    """A base's UNet with a LoRA, and its text encoder if that has one too; the LoRAs' parameters
    are float32."""

    base_name: str
    unet: UNet2DConditionModel
    unet_parameters: Sequence[nn.Parameter]
    text_encoder: CLIPTextModel | None = None
    text_encoder_parameters: Sequence[nn.Parameter] = field(default=())
    has_dropout: bool = False
    notes: Callable[[], Mapping[str, str]] = dict  # for the LoRA's files (lora.notes)

    @property
    def models(self) -> list[nn.Module]:
        """Those in training, the UNet first."""
        return [self.unet] if self.text_encoder is None else [self.unet, self.text_encoder]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that are trained, the UNet's first."""
        return [*self.unet_parameters, *self.text_encoder_parameters]

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


@contextmanager
def storing_unet(base: Base, base_precision: str) -> Iterator[None]:
    """Within this a LoRA is injected; the UNet is stored in float8 at its end if base_precision is
    fp8.

    Until then it is on the CPU, so that the device never holds all of it in the run's precision.
    """
    if base_precision != "fp8":
        yield
        return
    unet = base.load_unet(CPU)
    yield
    store_in_float8(unet)
    move(unet, base.device)


def inject_lora(
    base: Base,
    config: LoraConfig,
    compute: TrainingCompute,
    seed: int,
    notes: Callable[[], Mapping[str, str]],
    is_new: bool = True,
) -> Adapters:
    """Inject the LoRAs, whose random halves depend on the seed alone, and have the models compute
    as set. A new run begins from --network_weights, if they are named. notes makes
    those of the LoRAs' files.

    Raises UserError if --network_weights do not fit the base, the rank or the target modules.
    """
    text_encoder = base.text_encoder if config.train_text_encoder else None
    first = None
    if config.network_weights and is_new:
        first = FirstWeights.read(config, models_by_part(base.unet, text_encoder))
    torch.manual_seed(seed)
    inject = partial(
        adapter.inject,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        dropout=config.lora_dropout,
    )
    prepare_unet(base.unet, compute)
    unet_parameters = inject(base.unet, target_modules=config.target_modules)
    text_encoder_parameters: list[nn.Parameter] = []
    if text_encoder is not None:
        text_encoder_parameters = inject(text_encoder, target_modules=adapter.TEXT_ENCODER_TARGETS)
    adapters = Adapters(
        base.name,
        base.unet,
        unet_parameters,
        text_encoder,
        text_encoder_parameters,
        has_dropout=config.lora_dropout > 0,
        notes=notes,
    )
    if first is not None:
        first.apply(models_by_part(base.unet, text_encoder))
    if compute.gradient_checkpointing:
        checkpoint_gradients(adapters.models)
    return adapters

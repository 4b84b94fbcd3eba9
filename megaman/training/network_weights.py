"""--network_weights: a run that begins from a LoRA.

It begins with exactly the LoRA's effect, whatever the run's alpha: B is scaled by the quotient of
the two scales. A LoRA of a lower rank keeps its rows and columns, and the rest begins as in a new
one, A random and B at zero. A higher rank, or layers that the run does not train, are refused: part
of the LoRA would be lost.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig as PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from megaman.errors import WRONG_USAGE, UserError
from megaman.lora import adapter
from megaman.lora.files import TEXT_ENCODER, LoraTensors, read_lora

if TYPE_CHECKING:
    from megaman.config.learning_settings import LoraConfig

REMEDY = "Name a LoRA for this base in --network_weights"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstWeights:
    """The LoRAs that a run begins from, by part, checked against its settings.

    scale is the run's own, alpha / rank or alpha / sqrt(rank).
    """

    path: str
    loras: Mapping[str, LoraTensors]
    rank: int
    scale: float

    @classmethod
    def read(cls, config: LoraConfig, models: Mapping[str, nn.Module]) -> FirstWeights:
        """Read the LoRA for models that have none yet, by part.

        Raises UserError if it is for another base, or of a higher rank, or if it changes layers
        that the run does not train.
        """
        path = str(config.network_weights)
        try:
            loras, has_other = read_lora(Path(path), models)
        except UserError as error:
            raise UserError(f"--network_weights: {error.message}", REMEDY, WRONG_USAGE) from None
        if has_other:
            log.info(
                "%s: its LoRA for the text encoder is skipped; --train_text_encoder trains it "
                "further",
                path,
            )
        highest = max(map(_highest_rank, loras.values()))
        if highest > config.lora_rank:
            raise UserError(
                f"--network_weights {path} has rank {highest}, above --lora_rank "
                f"{config.lora_rank}",
                f"Add --lora_rank {highest}",
                WRONG_USAGE,
            )
        if "unet" in loras:
            _require_targets(path, loras["unet"], config.target_modules)
        if TEXT_ENCODER in loras:
            _require_targets(path, loras[TEXT_ENCODER], adapter.TEXT_ENCODER_TARGETS)
        divisor = math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank
        return cls(path, loras, config.lora_rank, config.lora_alpha / divisor)

    @torch.no_grad()
    def apply(self, models: Mapping[str, nn.Module]) -> None:
        """Set the parameters of models in which LoRAs have been injected."""
        counts = []
        for part, lora in self.loras.items():
            parameters = adapter.parameters(models[part])
            for layer, scale in _scales(lora).items():
                for side, factor in (("A", 1.0), ("B", scale / self.scale)):
                    tensor = lora.state[f"{layer}.lora_{side}.weight"].float() * factor
                    parameter = parameters[f"{layer}.lora_{side}.{adapter.ADAPTER}.weight"]
                    rows, columns = tensor.shape[:2]
                    parameter[:rows, :columns] = tensor.to(parameter.device)
                counts.append(len(lora.state[f"{layer}.lora_A.weight"]))
        line = f"beginning  from {self.path}, {len(counts)} layers"
        lower = sum(rank < self.rank for rank in counts)
        if lower:
            line += f"; {lower} of a rank below {self.rank} get more rows, which begin anew"
        log.info(line)


def _highest_rank(lora: LoraTensors) -> int:
    return max(len(tensor) for name, tensor in lora.state.items() if ".lora_A." in name)


def _scales(lora: LoraTensors) -> dict[str, float]:
    """The scale of each layer: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    config = PeftConfig(**lora.config)
    alphas: dict[str, float] = dict(config.alpha_pattern or {})
    scales = {}
    for name, tensor in lora.state.items():
        layer, _, side = name.rpartition(".lora_")
        if side == "A.weight":
            alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
            scales[layer] = alpha / (math.sqrt(len(tensor)) if config.use_rslora else len(tensor))
    return scales


def _require_targets(path: str, lora: LoraTensors, targets: tuple[str, ...] | list[str]) -> None:
    """Raise UserError if the LoRA changes a layer that none of the run's target modules ends."""
    layers = [name.partition(".lora_")[0] for name in lora.state]
    others = [
        layer
        for layer in dict.fromkeys(layers)
        if not any(layer == target or layer.endswith(f".{target}") for target in targets)
    ]
    if others:
        names = dict.fromkeys(_target_of(layer) for layer in others)
        raise UserError(
            f"--network_weights {path} changes layers that are not among --target_modules",
            f"Add {', '.join(names)} to these",
            WRONG_USAGE,
        )


def _target_of(layer: str) -> str:
    """The end of a layer's name that names its kind, such as to_out.0."""
    parts = layer.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])

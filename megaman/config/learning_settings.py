"""Settings of training: the LoRA, the optimizer and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from megaman.config.cli import flag
from megaman.config.presets import DEFAULT_TARGETS
from megaman.config.values import (
    COUNT_OR_ZERO,
    MANY,
    PROBABILITY,
    RATE,
    SHARE,
    name,
    number,
    path,
    steps_or_auto,
)

SCHEDULERS = [
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
]

# The optimizers, and the numbers of 4 bytes that each keeps for one of the LoRA's.
OPTIMIZERS = {"adamw": 2.0, "adamw8bit": 0.5, "prodigy": 4.0}


@dataclass(frozen=True)
class LoraConfig:
    """LoRA"""

    lora_rank: int = flag(
        4, "rank of the LoRA's matrices", number(int, 1, 1024), common=True, resume=True
    )
    lora_alpha: float = flag(
        32,
        "strength: scale = alpha / rank",
        number(float, 0, 65536, exclusive=True),
        common=True,
        resume=True,
    )
    network_weights: str | None = flag(
        None, "begin from this LoRA, a folder or a .safetensors file", path, metavar="LORA"
    )
    use_rslora: bool = flag(
        False, "scale by alpha / sqrt(rank), so that high ranks learn as fast", resume=True
    )
    lora_dropout: float = flag(0.0, "probability that the LoRA drops an input of a layer", SHARE)
    target_modules: tuple[str, ...] = flag(
        DEFAULT_TARGETS, "UNet layers that get a LoRA", name, nargs="+", metavar="NAME", resume=True
    )
    train_text_encoder: bool = flag(
        False, "a LoRA for the text encoder too", common=True, resume=True
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Steps and learning rate"""

    train_batch_size: int = flag(
        1, "images per forward pass and device", number(int, 1, 4096), common=True
    )
    gradient_accumulation_steps: int = flag(
        1, "forward passes per optimizer step", number(int, 1, 65536), common=True
    )
    num_train_epochs: int = flag(
        100, "times every image is seen", number(int, 1, 10**6), common=True
    )
    max_train_steps: int | str | None = flag(
        None,
        "optimizer steps; wins over --num_train_epochs",
        steps_or_auto,
        metavar="N|auto",
        common=True,
    )
    optimizer: str = flag(
        "adamw",
        "the optimizer; adamw8bit needs bitsandbytes, prodigy prodigyopt",
        choices=tuple(OPTIMIZERS),
        resume=True,
    )
    learning_rate: float = flag(1e-4, "peak learning rate", RATE, common=True)
    text_encoder_lr: float | None = flag(
        None, "the text encoder's peak learning rate (default: as --learning_rate)", RATE
    )
    lr_scheduler: str = flag(
        "constant",
        f"how the learning rate changes: {', '.join(SCHEDULERS)}",
        choices=tuple(SCHEDULERS),
        metavar="NAME",
        common=True,
    )
    lr_warmup_steps: int = flag(500, "steps over which the learning rate rises", COUNT_OR_ZERO)
    adam_beta1: float = flag(0.9, "AdamW's first decay", SHARE)
    adam_beta2: float = flag(0.999, "AdamW's second decay", SHARE)
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay", number(float, 0, 100))
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", number(float, 0, 1, exclusive=True))
    max_grad_norm: float = flag(
        1.0, "gradients are clipped to this norm", number(float, 0, MANY, exclusive=True)
    )


@dataclass(frozen=True)
class LossConfig:
    """Loss"""

    snr_gamma: float | None = flag(
        None, "min-SNR loss weighting; 5 is usual", number(float, 0, 1000, exclusive=True)
    )
    noise_offset: float = flag(0.0, "strength of an offset noise; 0.05 is usual", PROBABILITY)
    prior_loss_weight: float = flag(
        1.0, "weight of the loss on --class_data_dir", number(float, 0, 1000)
    )

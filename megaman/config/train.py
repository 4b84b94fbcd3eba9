"""megaman_lora.py's command line, read before any heavy import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megaman.config.cli import Parser, fill
from megaman.config.contradictions import contradictions
from megaman.config.presets import DEMO_TRAINING, PRESETS
from megaman.config.settings import ORDER, TrainConfig


def train_parser() -> Parser:
    """The parser of megaman_lora.py."""
    return Parser(
        TrainConfig,
        prog="megaman_lora.py",
        description="Train a LoRA for Stable Diffusion on a folder of images.",
        examples=[
            "python megaman_lora.py --demo",
            "python megaman_lora.py --data_dir ./megaman_images --check_data",
            "python megaman_lora.py --data_dir ./megaman_images --preset quality",
        ],
        order=ORDER,
    )


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Parse megaman_lora.py's command line.

    Typed flags win over --preset, that over --demo, and that over the plain defaults. All errors
    are reported together, with exit code 2.
    """
    parser = train_parser()
    typed, errors = parser.read(argv)
    demo = DEMO_TRAINING if typed.get("demo") else {}
    if "crop_variants" in typed and "center_crop" not in typed:
        # With the demo's center_crop it would have no effect.
        demo = {**demo, "center_crop": False}
    recipe = {**demo, **PRESETS.get(typed.get("preset", ""), {})}
    if "num_train_epochs" in typed:
        # With the recipe's steps, which win over epochs, they would have no effect.
        recipe.pop("max_train_steps", None)
    values = {**parser.defaults(), **recipe, **typed}
    config = fill(TrainConfig, {**values, **derived(values)}, explicit=typed)
    errors += contradictions(config)
    if errors:
        parser.refuse(errors)
    return replace(config, argv=tuple(argv))


def derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that follow from others."""
    affixes = {
        flag: " ".join((values[flag] or "").split())
        for flag in ("trigger_word", "caption_prefix", "caption_suffix")
    }
    text_encoder_lr, keep_tokens = values["text_encoder_lr"], values["keep_tokens"]
    if values["train_text_encoder"] and text_encoder_lr is None:
        text_encoder_lr = values["learning_rate"]
    if keep_tokens is None:  # shuffling must not move the trigger word by accident
        trigger_word = affixes["trigger_word"]
        keep_tokens = sum(map(trigger_word.count, ",，、")) + 1 if trigger_word else 0
    return {**affixes, "text_encoder_lr": text_encoder_lr, "keep_tokens": keep_tokens}

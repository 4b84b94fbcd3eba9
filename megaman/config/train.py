"""megaman_lora.py's command line, read before any heavy import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaman.config.cli import Parser, fill, frozen
from megaman.config.config_file import FileFlags, merge, read_config_file
from megaman.config.contradictions import INTERVALS, contradictions
from megaman.config.current_folder import relative_defaults
from megaman.config.generate import GenerateConfig
from megaman.config.presets import AUTO_PATIENCE, DEFAULT_SPLIT, DEMO_TRAINING, PRESETS
from megaman.config.settings import ORDER, TrainConfig

# Pairs of flags of which a typed one takes the place of the other in --config.
EXCLUSIVE = (
    ("resume_from_checkpoint", "overwrite_output"),
    ("num_train_epochs", "max_train_steps"),
    ("center_crop", "crop_variants"),
    *INTERVALS,
    ("validation_prompt", "validation_prompts_file"),
    ("validation_split", "validation_data_dir"),
)


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

    Typed flags win over those of --config, these over --preset, that over --demo, and that over the
    plain defaults. All errors are reported together, with exit code 2.
    """
    parser = train_parser()
    typed, errors = parser.read(argv)
    explicit = frozenset(typed)
    if typed.get("config"):
        file = _read_config(parser, typed["config"])
        errors += file.errors
        typed = merge(file.values, typed, EXCLUSIVE)
        explicit |= frozenset(file.explicit or ()) & typed.keys()
    values = {**parser.defaults(), **_recipe(typed), **typed}
    config = fill(TrainConfig, {**values, **derived(values)}, explicit)
    if errors := [*errors, *contradictions(config)] or [*relative_defaults(_places(config))]:
        parser.refuse(errors)
    return replace(config, argv=tuple(argv))


def _places(config: TrainConfig) -> dict[str, str]:
    """The folders that the run needs and that have defaults, by flag."""
    places = {}
    if not (config.run.plan or config.run.system_info):
        places["data_dir"] = config.data.data_dir
    if not config.run.plan:
        places["output_dir"] = config.output.output_dir
    if not (config.run.plan or config.run.check_data):
        places["logging_dir"] = config.output.logging_dir
    return places


def _recipe(typed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of --demo and --preset, without those that would make a typed flag have no
    effect."""
    recipe = dict(DEMO_TRAINING) if typed.get("demo") else {}
    if "crop_variants" in typed and "center_crop" not in typed:
        recipe.pop("center_crop", None)
    recipe |= PRESETS.get(typed.get("preset") or "", {})
    if typed.get("optimizer") == "prodigy":
        recipe["learning_rate"] = 1.0  # a factor on the rate that it finds
    if "validation_prompts_file" in typed:
        recipe["num_validation_images"] = 1  # of each prompt
    if "data_dir" in typed or typed.get("validation_split") is not None:
        recipe.pop("validation_data_dir", None)  # which is for the demo's images
    if "data_dir" in typed:
        recipe.pop("validation_prompt", None)  # which is about the demo's hero
    if "num_train_epochs" in typed:
        recipe.pop("max_train_steps", None)  # which win over epochs
    return recipe


def _read_config(parser: Parser, path: str) -> FileFlags:
    """The flags of --config. In a training_config.json of an earlier version, those count as typed
    that differ from what the run's preset would have set."""
    file = read_config_file(Path(path), TrainConfig, "generate_megaman.py", GenerateConfig)
    if file.explicit is not None:
        return file
    recipe = {**parser.defaults(), **_recipe(file.values)}
    asked = ("preset", "demo")
    different = {name for name, value in file.values.items() if frozen(value) != recipe[name]}
    names = different | {name for name in asked if file.values.get(name)}
    values = {name: file.values[name] for name in names}
    return replace(file, values=values, explicit=frozenset(names))


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
    return {
        **affixes,
        **_derived_evaluation(values),
        "text_encoder_lr": text_encoder_lr,
        "keep_tokens": keep_tokens,
    }


def _derived_evaluation(values: Mapping[str, Any]) -> dict[str, Any]:
    """--max_train_steps auto stops early, and what stops early needs held-out images."""
    patience, split = values["early_stopping_patience"], values["validation_split"]
    if values["max_train_steps"] == "auto" and patience is None:
        patience = AUTO_PATIENCE
    if patience is not None and split is None and values["validation_data_dir"] is None:
        split = DEFAULT_SPLIT
    return {"early_stopping_patience": patience, "validation_split": split}

"""generate_megaman.py's command line: flags and defaults.

Contradictions are refused here, before a heavy import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaman.config import samplers
from megaman.config.bases import SUITED
from megaman.config.cli import Parser, fill, flag, settings_of
from megaman.config.config_file import merge, read_config_file
from megaman.config.current_folder import relative_defaults
from megaman.config.presets import DEMO
from megaman.config.settings import TrainConfig
from megaman.config.values import (
    GUIDANCE,
    SEED,
    STEPS,
    folder,
    lora,
    model_folder,
    number,
    path,
    path_or_name,
    pixel_art,
    sampler,
    side,
    strengths,
    text,
)

DEFAULT_NEGATIVE_PROMPT = "blurry, low quality, distorted, deformed, ugly, bad anatomy"
DEMO_GENERATION: dict[str, Any] = {
    "base_model": str(DEMO / "base"),  # a LoRA in a single file does not name its base
    "lora_path": ["./megaman_demo_output/lora_weights"],
    "output_dir": "./generated_demo",
    "prompts_file": str(DEMO / "prompts.txt"),
    **SUITED["demo/base"],
    "compare": ["base"],
}
DASHED = re.compile(r"[\u2010-\u2015\u2212]+[a-z]\w*(=.*)?", flags=re.DOTALL)
BASE = "base"  # in --compare
# The flags that may be given with --from_image.
WITH_FROM_IMAGE = {
    "from_image",
    "config",
    "output_dir",
    "open",
    "pixel_art",
    "device",
    "lora_path",
    "base_model",
}

# Pairs of flags of which a typed one takes the place of the other in --config.
EXCLUSIVE = (
    ("prompts", "prompts_file"),
    ("lora_scale", "lora_scales"),
    ("compare", "lora_scales"),
    ("compare", "checkpoints"),
    ("lora_path", "checkpoints"),
)


@dataclass(frozen=True)
class ModelConfig:
    """Base model and LoRAs"""

    demo: bool = flag(
        False, "the embedded base with the LoRA that megaman_lora.py --demo trained", common=True
    )
    config: str | None = flag(
        None, "flags from a TOML or JSON file", path, metavar="FILE", common=True
    )
    base_model: str | None = flag(
        None,
        "the base: a name on the hub, a local folder or a .safetensors file (default: the LoRA's)",
        path_or_name,
        metavar="NAME",
        common=True,
    )
    lora_path: tuple[str, ...] = flag(
        ["./megaman_lora_output/lora_weights"],
        "LoRAs, folders or .safetensors files, each with a strength after a colon if not 1",
        lora,
        nargs="+",
        metavar="NAME[:STRENGTH]",
        common=True,
    )


@dataclass(frozen=True)
class OutputConfig:
    """Output"""

    output_dir: str = flag(
        "./generated_megaman",
        "images and index.html go here; existing ones stay",
        folder,
        metavar="FOLDER",
        common=True,
    )
    open: bool = flag(False, "open the gallery in a browser")
    pixel_art: str | None = flag(
        None,
        "save each image as pixel art too, with N cells on its shorter side",
        pixel_art,
        metavar="N[,PALETTE]",
        common=True,
    )


@dataclass(frozen=True)
class PromptConfig:
    """Prompts"""

    prompts: tuple[str, ...] | None = flag(
        None,
        "one or more prompts (default: ten about what the LoRA was trained on, or Mega Man)",
        text,
        nargs="+",
        metavar="PROMPT",
        common=True,
    )
    prompts_file: str | None = flag(
        None,
        "a file with one prompt per line; # begins a comment",
        path,
        metavar="FILE",
        common=True,
    )
    negative_prompt: str = flag(
        DEFAULT_NEGATIVE_PROMPT, "what the images should not show", text, common=True
    )
    num_images_per_prompt: int = flag(
        1, "images of each prompt", number(int, 1, 10000), common=True
    )


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling"""

    num_inference_steps: int = flag(25, "sampling steps", STEPS, common=True)
    guidance_scale: float = flag(7.5, "how closely the prompt is followed", GUIDANCE, common=True)
    height: int | None = flag(
        None,
        "image height in pixels (default: 512; the base's own size if it is smaller)",
        side,
        common=True,
    )
    width: int | None = flag(
        None, "image width in pixels (default: as for --height)", side, common=True
    )
    seed: int = flag(42, "image j of a prompt uses seed + j", SEED, common=True)
    scheduler: str = flag(
        samplers.DEFAULT.name,
        "the sampler, by A1111's name, kohya's or diffusers'",
        sampler,
        metavar="NAME",
    )
    clip_skip: int = flag(
        1, "2 takes the text encoder's output one layer earlier, as A1111", number(int, 1, 64)
    )


@dataclass(frozen=True)
class ComputeConfig:
    """Speed and memory"""

    batch_size: int | None = flag(
        None, "images generated at once (default: what is fast and fits)", number(int, 1, 1024)
    )
    device: str | None = flag(
        None,
        "where to compute (default: the best there is)",
        choices=("cuda", "mps", "cpu"),
        common=True,
    )


@dataclass(frozen=True)
class ComparisonConfig:
    """Comparison"""

    compare: tuple[str, ...] | None = flag(
        None,
        "generate each image with the base alone too (base), or with each of several LoRAs",
        lora,
        nargs="+",
        metavar="base|LORA",
        common=True,
    )
    lora_scale: float | None = flag(
        None,
        "a factor on the strength of all LoRAs (default: 1)",
        number(float, -10, 10),
        common=True,
    )
    lora_scales: tuple[float, ...] | None = flag(
        None,
        "generate at each of these strengths; 0 is the base alone",
        strengths,
        metavar="S,S,...",
        common=True,
    )
    checkpoints: str | None = flag(
        None, "generate with every checkpoint of this training output", path, metavar="FOLDER"
    )
    clip_model: str | None = flag(
        None,
        "measure by this CLIP model's features how near images are to training images",
        model_folder,
        metavar="FOLDER",
    )

    @property
    def pairs_with_base(self) -> bool:
        """Whether each image gets the base's image next to it."""
        return bool(self.compare) and not self.loras

    @property
    def loras(self) -> tuple[str, ...]:
        """The LoRAs to compare with each other and with the base, each perhaps with a strength."""
        return tuple(name for name in self.compare or () if name != BASE)


@dataclass(frozen=True)
class AgainConfig:
    """Earlier runs and images"""

    resume: bool = flag(
        False, "continue the stopped run of the same flags; nothing is generated twice", common=True
    )
    from_image: str | None = flag(
        None, "generate an image again, with all the settings that it carries", path, metavar="PNG"
    )


@dataclass(frozen=True)
class GenerateConfig:
    """All settings of a generation, by group."""

    model: ModelConfig
    output: OutputConfig
    prompts: PromptConfig
    sampling: SamplingConfig
    compute: ComputeConfig
    comparison: ComparisonConfig
    again: AgainConfig
    explicit: frozenset[str]  # flags that were typed

    def settings(self) -> dict[str, Any]:
        """The value of every flag, as JSON holds it."""
        return settings_of(self)


def generate_parser() -> Parser:
    """The parser of generate_megaman.py."""
    return Parser(
        GenerateConfig,
        prog="generate_megaman.py",
        description="Generate images with a trained LoRA and show them in a gallery.",
        examples=[
            "python generate_megaman.py --demo",
            "python generate_megaman.py --lora_path ./megaman_lora_output/lora_weights",
            "python generate_megaman.py --prompts_file prompts.txt --num_images_per_prompt 4",
        ],
    )


def parse_generate_config(argv: Sequence[str]) -> GenerateConfig:
    """The config of a command line: the plain defaults, then --demo's, then the flags of --config,
    then the typed ones.

    All errors are reported together, with exit code 2.
    """
    parser = generate_parser()
    typed, errors = parser.read(argv)
    if typed.get("config"):
        file_path = Path(typed["config"])
        file = read_config_file(file_path, GenerateConfig, "megaman_lora.py", TrainConfig)
        errors += file.errors
        typed = merge(file.values, typed, EXCLUSIVE)
    demo = DEMO_GENERATION if typed.get("demo") else {}
    if "prompts" in typed:
        demo = {**demo, "prompts_file": None}
    if {"lora_scales", "checkpoints"} & set(typed):
        demo = {**demo, "compare": None}
    config = fill(GenerateConfig, {**parser.defaults(), **demo, **typed}, explicit=typed)
    if errors := [*errors, *contradictions(config)] or [*relative_defaults(_places(config))]:
        parser.refuse(errors)
    return config


def _places(config: GenerateConfig) -> dict[str, str]:
    """The folders that the generation needs and that have defaults, by flag."""
    places = {"output_dir": config.output.output_dir}
    if not (config.comparison.loras or config.comparison.checkpoints or config.again.from_image):
        places["lora_path"] = config.model.lora_path[0]
    return places


def contradictions(config: GenerateConfig) -> Iterator[str]:
    """A line for each pair of flags that exclude each other."""
    comparison = config.comparison
    for word in (*(config.prompts.prompts or ()), *config.model.lora_path, *comparison.loras):
        if DASHED.fullmatch(word):
            yield f"{word} begins with a long dash, as editors make it: write two hyphens"
    if config.prompts.prompts and config.prompts.prompts_file:
        yield "--prompts and --prompts_file contradict each other: use only one"
    if comparison.loras and (comparison.lora_scales or comparison.checkpoints):
        yield "--compare LORA is at one strength each: write LORA:STRENGTH, as often as you like"
    elif comparison.compare and (comparison.lora_scales or comparison.checkpoints):
        yield "--compare base is for one LoRA at one strength: write --lora_scales 0,1 instead"
    if comparison.lora_scale is not None and comparison.lora_scales:
        yield "--lora_scale and --lora_scales contradict each other: use only one"
    if config.again.from_image:
        for flag_name in sorted(config.explicit - WITH_FROM_IMAGE):
            yield f"--{flag_name} and --from_image contradict each other: use only one"
    if comparison.loras and "lora_path" in config.explicit:
        yield "--compare LORA and --lora_path contradict each other: name all LoRAs in --compare"
    if comparison.checkpoints and "lora_path" in config.explicit:
        yield "--checkpoints and --lora_path contradict each other: use only one"

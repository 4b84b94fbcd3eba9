"""Settings of training: the run itself, its base, how it computes, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass

from megaman.config.cli import flag
from megaman.config.presets import DEFAULT_PROMPT, PRESETS
from megaman.config.values import (
    COUNT,
    GUIDANCE,
    SEED,
    folder,
    model_folder,
    number,
    path,
    path_or_name,
    text,
)
from megaman.hub import DEFAULT_BASE


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    preset: str | None = flag(
        None, "a recipe; flags that are typed win", choices=tuple(PRESETS), common=True
    )
    config: str | None = flag(
        None,
        "flags from a TOML or JSON file",
        path,
        metavar="FILE",
        common=True,
    )
    demo: bool = flag(False, "everything embedded: a whole run in minutes", common=True)
    check_data: bool = flag(False, "report on images and captions, train nothing", common=True)
    plan: bool = flag(False, "show the memory that it would need, train nothing", common=True)
    system_info: bool = flag(
        False, "show versions, device and what is wrong with them, train nothing"
    )
    strict: bool = flag(False, "with --check_data: exit 1 if something is wrong")
    seed: int | None = flag(
        None, "makes a run repeatable (default: a random one)", SEED, common=True
    )


@dataclass(frozen=True)
class BaseConfig:
    """Base model"""

    pretrained_model_name: str = flag(
        DEFAULT_BASE,
        "a name on the hub, a local folder or a .safetensors file",
        path_or_name,
        metavar="NAME",
        common=True,
    )


@dataclass(frozen=True)
class ComputeConfig:
    """Speed and memory"""

    mixed_precision: str = flag(
        "fp16", "precision of the frozen base", choices=("no", "fp16", "bf16"), common=True
    )
    base_precision: str = flag(
        "same",
        "how the frozen UNet is stored: as it computes, or in fp8, which takes half the memory",
        choices=("same", "fp8"),
        resume=True,
    )
    memory_format: str = flag(
        "auto", "memory layout of the convolutions", choices=("auto", "contiguous", "channels_last")
    )
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "use xformers' attention instead of torch's own (sdpa); for NVIDIA GPUs"
    )
    compile: bool = flag(False, "compile the UNet's repeated blocks; for NVIDIA GPUs")
    gradient_checkpointing: bool = flag(False, "less memory, slower steps", common=True)
    vram_limit: float | None = flag(
        None,
        "GPU memory to stay within (default: what is free)",
        number(float, 0, 1024, exclusive=True),
        metavar="GB",
        common=True,
    )


@dataclass(frozen=True)
class ValidationConfig:
    """Sample images"""

    validation_prompt: str = flag(DEFAULT_PROMPT, "what the sample images show", text, common=True)
    validation_prompts_file: str | None = flag(
        None,
        "prompts of sample images instead, one per line as for generate_megaman.py",
        path,
        metavar="FILE",
    )
    validation_guidance_scale: float = flag(
        7.5, "how closely sample images follow their prompts", GUIDANCE
    )
    clip_model: str | None = flag(
        None,
        "measure by this CLIP model's features how near images are to training images",
        model_folder,
        metavar="FOLDER",
    )
    validation_steps: int = flag(100, "steps between sample images", COUNT, common=True)
    validation_epochs: int | None = flag(
        None, "epochs between sample images, in place of --validation_steps", COUNT
    )
    num_validation_images: int = flag(
        4, "sample images each time; 0 for none", number(int, 0, 1000), common=True
    )


@dataclass(frozen=True)
class OutputConfig:
    """Output and checkpoints"""

    output_dir: str = flag(
        "./megaman_lora_output",
        "checkpoints, samples and the LoRA go here",
        folder,
        metavar="FOLDER",
        common=True,
    )
    overwrite_output: bool = flag(False, "delete the outputs of an earlier run in --output_dir")
    logging_dir: str = flag("./logs", "TensorBoard's folder", folder, metavar="FOLDER")
    log_format: str = flag(
        "text",
        "lines of text for people, or json for programs: one object per line",
        choices=("text", "json"),
    )
    open: bool = flag(False, "open the page that follows the run in a browser")
    save_steps: int = flag(500, "steps between checkpoints", COUNT, common=True)
    save_every_n_epochs: int | None = flag(
        None, "epochs between checkpoints, in place of --save_steps", COUNT
    )
    checkpoints_total_limit: int | None = flag(
        None, "checkpoints kept; older ones are deleted", COUNT
    )
    resume_from_checkpoint: str | None = flag(
        None, "resume from a checkpoint", path_or_name, metavar="latest|FOLDER", common=True
    )
    save_precision: str = flag(
        "float", "precision of lora_weights/", choices=("float", "fp16", "bf16")
    )

"""megaman_lora.py's command line: flags, defaults, presets. Contradictions are refused here, before
any heavy import."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megaman.config.cli import Parser, fill, flag, flags_of, resume_command, settings_of
from megaman.config.values import SEED, extension, folder, name, number, path, side, text
from megaman.files import path_within
from megaman.hub import DEFAULT_BASE, PROJECT

DEFAULT_PROMPT = "mega man, blue robot, helmet, game character, high quality"
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
SCHEDULERS = [
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
]
# The folders in --output_dir that a run replaces.
REPLACED = r"((checkpoint|samples)-\d+|lora_weights)(?![^/\\])"
POLYNOMIAL_END = 1e-7  # where diffusers' polynomial schedule ends

DEMO = PROJECT / "demo"

PRESETS: dict[str, dict[str, Any]] = {
    "starter": {"lora_rank": 4, "lora_alpha": 16, "learning_rate": 1e-4, "max_train_steps": 1000},
    "quality": {"lora_rank": 8, "lora_alpha": 32, "learning_rate": 5e-5, "max_train_steps": 2000},
    "professional": {
        "lora_rank": 16,
        "lora_alpha": 64,
        "learning_rate": 2e-5,
        "max_train_steps": 3000,
    },
}

# What teaches the embedded base its hero on two cores in about two minutes.
# Convolutions are among the targets because they hold most shapes of a small UNet.
DEMO_TRAINING: dict[str, Any] = {
    "pretrained_model_name": str(DEMO / "base"),
    "data_dir": str(DEMO / "images"),
    "output_dir": "./megaman_demo_output",
    "resolution": 64,
    "center_crop": True,
    "train_batch_size": 4,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "lora_rank": 16,
    "lora_alpha": 16,
    "snr_gamma": 5.0,
    "target_modules": [*DEFAULT_TARGETS, "conv1", "conv2", "conv_in"],
    "max_train_steps": 900,
    "save_steps": 300,
    "validation_steps": 300,
    "validation_prompt": (
        "volto, blue robot hero, pixel art, standing, front view, white background"
    ),
    "mixed_precision": "no",
    "seed": 0,
}

MANY = 10**9  # more steps than any run has; "never" for what happens every so many steps
COUNT = number(int, 1, MANY)
COUNT_OR_ZERO = number(int, 0, MANY)
SHARE = number(float, 0, 0.999999)
PROBABILITY = number(float, 0, 1)
RATE = number(float, 0, 1, exclusive=True)

# The order of the settings in training_config.json.
ORDER = (
    "preset", "demo", "pretrained_model_name", "data_dir", "caption_extension", "trigger_word",
    "caption_prefix", "caption_suffix", "shuffle_caption", "keep_tokens", "caption_dropout_rate",
    "caption_tag_dropout_rate", "dataset_repeats", "auto_caption", "class_data_dir",
    "prior_loss_weight", "output_dir", "overwrite_output", "logging_dir", "resolution",
    "check_data", "plan", "strict", "skip_bad_images", "center_crop", "crop_variants",
    "random_flip", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
    "bucket_no_upscale", "cache_dir", "cache_limit", "no_cache", "train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "learning_rate",
    "train_text_encoder", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lora_rank",
    "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "dataloader_num_workers", "save_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps", "validation_prompt",
    "num_validation_images", "snr_gamma", "noise_offset", "mixed_precision", "save_precision",
    "memory_format", "enable_xformers_memory_efficient_attention", "compile",
    "gradient_checkpointing", "vram_limit", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    preset: str | None = flag(
        None, "a recipe; flags that are typed win", choices=tuple(PRESETS), common=True
    )
    demo: bool = flag(False, "everything embedded: a whole run in minutes", common=True)
    check_data: bool = flag(False, "report on images and captions, train nothing", common=True)
    plan: bool = flag(False, "show the memory that it would need, train nothing", common=True)
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
        path,
        metavar="NAME",
        common=True,
    )


@dataclass(frozen=True)
class DataConfig:
    """Images"""

    data_dir: str = flag(
        "./megaman_images",
        "the images, each with an optional caption in NAME.txt",
        path,
        metavar="FOLDER",
        common=True,
    )
    class_data_dir: str | None = flag(
        None,
        "regularization images: what the base should still generate as before",
        path,
        metavar="FOLDER",
    )
    dataset_repeats: int = flag(1, "times that an epoch sees every image", number(int, 1, 10**5))
    skip_bad_images: bool = flag(False, "train even if most of the images cannot be used")
    resolution: int = flag(
        512,
        "side of the square images in pixels, a multiple of 8",
        side,
        common=True,
        resume=True,
    )
    center_crop: bool = flag(False, "crop the middle; otherwise at random", resume=True)
    crop_variants: int = flag(
        4, "random crops kept of an image that is not square", number(int, 1, 64), resume=True
    )
    random_flip: bool = flag(
        False,
        "mirror images at random, unless the caption says left or right",
        common=True,
        resume=True,
    )
    dataloader_num_workers: int = flag(0, "processes that decode images", number(int, 0, 64))


@dataclass(frozen=True)
class CaptionConfig:
    """Captions"""

    caption_extension: str | None = flag(
        None,
        "of the caption files (default: .txt, if there is none .caption)",
        extension,
        metavar="EXT",
    )
    trigger_word: str = flag(
        "", "added in front of captions that do not contain it", text, common=True
    )
    caption_prefix: str = flag("", "added in front of every caption, with a space", text)
    caption_suffix: str = flag("", "added after every caption, with a space", text)
    auto_caption: str | None = flag(
        None,
        "BLIP (a name on the hub or a folder) writes missing captions",
        path,
        metavar="MODEL",
        common=True,
    )
    shuffle_caption: bool = flag(
        False, "shuffle the tags between commas at every visit", resume=True
    )
    keep_tokens: int = flag(  # derived if it is not typed
        None,
        "first tags that stay (default: the trigger word's, or 0)",
        number(int, 0, 1000),
        resume=True,
    )
    caption_dropout_rate: float = flag(
        0.0, "probability that a caption is dropped", PROBABILITY, resume=True
    )
    caption_tag_dropout_rate: float = flag(
        0.0, "probability that a tag is dropped", PROBABILITY, resume=True
    )

    @property
    def varies_tags(self) -> bool:
        """Whether tags are shuffled or dropped, so that captions cannot be encoded in advance."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0


@dataclass(frozen=True)
class BucketConfig:
    """Aspect-ratio buckets"""

    enable_bucket: bool = flag(
        False, "train on images in their own aspect ratios", common=True, resume=True
    )
    min_bucket_reso: int | None = flag(
        None, "shortest side of a bucket (default: half of the base's size)", side, resume=True
    )
    max_bucket_reso: int | None = flag(
        None, "longest side of a bucket (default: twice the base's size)", side, resume=True
    )
    bucket_reso_steps: int | None = flag(
        None,
        "what the sides are multiples of (default: an eighth of the base's size)",
        side,
        resume=True,
    )
    bucket_no_upscale: bool = flag(
        False, "small images get buckets of their own instead of being enlarged", resume=True
    )

    def limits(self, resolution: int) -> dict[str, Any]:
        """The limits of the buckets, as arguments of make_buckets."""
        return {
            "resolution": resolution,
            "smallest": self.min_bucket_reso,
            "largest": self.max_bucket_reso,
            "step": self.bucket_reso_steps,
            "upscale": not self.bucket_no_upscale,
        }


@dataclass(frozen=True)
class CacheConfig:
    """Cache of encoded images"""

    cache_dir: str | None = flag(
        None,
        "where encoded images are kept for later runs (default: ~/.cache/megaman_lora)",
        folder,
        metavar="FOLDER",
    )
    cache_limit: float = flag(10.0, "maximum size", number(float, 0, MANY), metavar="GB")
    no_cache: bool = flag(
        False, "encode an image again at every visit, with a new random crop each time", resume=True
    )

    def path(self) -> Path | None:
        """The folder of the cache; None with --no_cache, or if the system has no home folder."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = os.path.expanduser(self.cache_dir or os.path.join(home, "megaman_lora"))
        return None if self.no_cache or place.startswith("~") else Path(place)


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
    max_train_steps: int | None = flag(
        None, "optimizer steps; wins over --num_train_epochs", COUNT, common=True
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


@dataclass(frozen=True)
class ComputeConfig:
    """Speed and memory"""

    mixed_precision: str = flag(
        "fp16", "precision of the frozen base", choices=("no", "fp16", "bf16"), common=True
    )
    memory_format: str = flag(
        "auto", "of the convolutions", choices=("auto", "contiguous", "channels_last")
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
    validation_steps: int = flag(100, "steps between sample images", COUNT, common=True)
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
    save_steps: int = flag(500, "steps between checkpoints", COUNT, common=True)
    checkpoints_total_limit: int | None = flag(
        None, "checkpoints kept; older ones are deleted", COUNT
    )
    resume_from_checkpoint: str | None = flag(
        None, "resume from a checkpoint", path, metavar="latest|FOLDER", common=True
    )
    save_precision: str = flag(
        "float", "precision of lora_weights/", choices=("float", "fp16", "bf16")
    )


@dataclass(frozen=True)
class MemoryRequest:
    """What the memory of a run depends on, in addition to its base and its precision.

    resolution is the side of the images in pixels. The text encoder stays in memory if it encodes
    captions at every step, the VAE if it encodes images at every step.
    """

    resolution: int
    lora_rank: int
    target_modules: tuple[str, ...]
    lora_dropout: float = 0.0
    encodes_text: bool = False
    trains_text_encoder: bool = False
    encodes_images: bool = False
    num_validation_images: int = 4


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run by concern, as parsed from argv."""

    run: RunConfig
    base: BaseConfig
    data: DataConfig
    captions: CaptionConfig
    buckets: BucketConfig
    cache: CacheConfig
    lora: LoraConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    compute: ComputeConfig
    validation: ValidationConfig
    output: OutputConfig
    explicit: frozenset[str]  # flags that were typed
    argv: tuple[str, ...] = field(default=(), compare=False)

    def resume_command(self) -> str:
        """The command line that resumes a run of this config."""
        return f"python megaman_lora.py {shlex.join(resume_command(list(self.argv)))}"

    def settings(self) -> dict[str, Any]:
        """The value of every flag, as training_config.json holds it."""
        values = settings_of(self)
        return {name: values[name] for name in ORDER}

    def resume_settings(self) -> dict[str, Any]:
        """The flags that a resumed run has to share, in addition to base, seed, images and their
        number per step."""
        flags = flags_of(TrainConfig)
        return {
            name: value
            for name, value in self.settings().items()
            if flags[name].metadata["flag"].resume
        }

    def memory_request(self) -> MemoryRequest:
        """What the memory of this run depends on."""
        return MemoryRequest(
            resolution=self.data.resolution,
            lora_rank=self.lora.lora_rank,
            target_modules=self.lora.target_modules,
            lora_dropout=self.lora.lora_dropout,
            encodes_text=self.captions.varies_tags or self.lora.train_text_encoder,
            trains_text_encoder=self.lora.train_text_encoder,
            encodes_images=self.cache.no_cache,
            num_validation_images=self.validation.num_validation_images,
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


def contradictions(config: TrainConfig) -> Iterator[str]:
    """What cannot be meant together. A flag that merely has no effect, such as epochs next to
    steps, or the prompt of sample images next to their number 0, is not an error."""
    if config.run.strict and not config.run.check_data:
        yield "--strict belongs to --check_data: add that or omit it"
    if config.run.plan and config.run.check_data:
        yield "--plan and --check_data are two questions: ask one at a time"
    if config.output.resume_from_checkpoint and config.output.overwrite_output:
        yield "--resume_from_checkpoint and --overwrite_output contradict each other: use only one"
    yield from _rate_contradictions(config)
    yield from _crop_contradictions(config)
    yield from _bucket_contradictions(config.buckets, config.data.resolution)
    if "prior_loss_weight" in config.explicit and not config.data.class_data_dir:
        yield _no_effect("prior_loss_weight", "class_data_dir")
    yield from _folder_contradictions(config)


def _no_effect(flag_name: str, required: str) -> str:
    return f"--{flag_name} has no effect without --{required}: add that or omit this"


def _rate_contradictions(config: TrainConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if "text_encoder_lr" in config.explicit and not config.lora.train_text_encoder:
        yield _no_effect("text_encoder_lr", "train_text_encoder")
    peaks = {"learning_rate": optimizer.learning_rate}
    if "text_encoder_lr" in config.explicit and optimizer.text_encoder_lr is not None:
        peaks["text_encoder_lr"] = optimizer.text_encoder_lr
    if optimizer.lr_scheduler == "polynomial":
        for flag_name, peak in peaks.items():
            if peak <= POLYNOMIAL_END:
                yield (
                    f"--lr_scheduler polynomial falls to {POLYNOMIAL_END:g}: give a higher "
                    f"--{flag_name}"
                )
    warmup, total = optimizer.lr_warmup_steps, optimizer.max_train_steps
    has_warmup = "lr_warmup_steps" in config.explicit and optimizer.lr_scheduler != "constant"
    if has_warmup and total and warmup >= total:
        yield (
            f"--lr_warmup_steps {warmup} is not below --max_train_steps {total}: the learning rate "
            "would never be reached; lower the one or raise the other"
        )


def _crop_contradictions(config: TrainConfig) -> Iterator[str]:
    has_variants = "crop_variants" in config.explicit and config.data.crop_variants > 1
    if config.data.center_crop and has_variants:
        yield "--center_crop and --crop_variants contradict each other: use only one"
    for flag_name in ("cache_dir", "cache_limit", "crop_variants"):
        if config.cache.no_cache and flag_name in config.explicit:
            yield f"--no_cache and --{flag_name} contradict each other: use only one"


def _bucket_contradictions(config: BucketConfig, resolution: int) -> Iterator[str]:
    for bucket_field in fields(BucketConfig):
        if getattr(config, bucket_field.name) and not config.enable_bucket:
            yield _no_effect(bucket_field.name, "enable_bucket")
    limits = resolution, config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps
    if config.enable_bucket and (error := contradiction(*limits)):
        yield ": ".join(error)


def _folder_contradictions(config: TrainConfig) -> Iterator[str]:
    output_dir, data_dir = config.output.output_dir, config.data.data_dir
    class_data_dir = config.data.class_data_dir
    sources = {"data_dir": data_dir}
    if class_data_dir:
        sources["class_data_dir"] = class_data_dir
    for flag_name, folder_name in sources.items():
        if path_within(output_dir, folder_name):
            yield (
                f"--output_dir {output_dir} is within --{flag_name}: its samples would be trained "
                "on; name another"
            )
    if class_data_dir and (
        path_within(class_data_dir, data_dir) or path_within(data_dir, class_data_dir)
    ):
        yield (
            f"--class_data_dir {class_data_dir} and --data_dir share images, which would be both "
            "learned and regularized: separate them"
        )
    for flag_name, folder_name in {**sources, "logging_dir": config.output.logging_dir}.items():
        if re.match(REPLACED, path_within(folder_name, output_dir) or ""):
            yield (
                f"--{flag_name} {folder_name} is where the run in --output_dir puts its outputs: "
                "name another"
            )


def contradiction(
    resolution: int, smallest: int | None, largest: int | None, step: int | None
) -> tuple[str, str] | None:
    """What is wrong with these limits of buckets, and the remedy; None if nothing is, as far as
    they are known."""
    if smallest and smallest > resolution:
        return f"--min_bucket_reso {smallest} is above --resolution {resolution}", "lower it"
    if largest and largest < resolution:
        return f"--max_bucket_reso {largest} is below --resolution {resolution}", "raise it"
    if step and step > resolution:
        message = (
            f"--bucket_reso_steps {step} is above --resolution {resolution}: no side would fit"
        )
        return message, "lower it"
    return None

"""All settings of a training run, as a frozen record of groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megaman import shell
from megaman.config.cli import flags_of, resume_command, settings_of
from megaman.config.evaluation_settings import EvaluationConfig
from megaman.config.image_settings import BucketConfig, CacheConfig, CaptionConfig, DataConfig
from megaman.config.learning_settings import LoraConfig, LossConfig, OptimizerConfig
from megaman.config.run_settings import (
    BaseConfig,
    ComputeConfig,
    OutputConfig,
    RunConfig,
    ValidationConfig,
)
from megaman.processes import launcher

# The order of the settings in training_config.json.
ORDER = (
    "config",
    "preset", "demo", "pretrained_model_name", "data_dir", "caption_extension", "trigger_word",
    "caption_prefix", "caption_suffix", "shuffle_caption", "keep_tokens", "caption_dropout_rate",
    "caption_tag_dropout_rate", "dataset_repeats", "auto_caption", "class_data_dir",
    "prior_loss_weight", "output_dir", "overwrite_output", "logging_dir", "log_format", "open",
    "resolution",
    "check_data", "plan", "system_info", "strict", "skip_bad_images", "center_crop",
    "crop_variants", "random_flip", "upscale", "background", "alpha_mask",
    "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
    "bucket_no_upscale", "cache_dir", "cache_limit", "no_cache", "train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "optimizer",
    "learning_rate",
    "train_text_encoder", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lora_rank",
    "lora_alpha",
    "network_weights", "use_rslora", "lora_dropout", "target_modules", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "dataloader_num_workers", "save_steps",
    "save_every_n_epochs", "validation_epochs",
    "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps", "validation_prompt",
    "validation_prompts_file", "validation_guidance_scale", "clip_model", "num_validation_images",
    "snr_gamma", "noise_offset", "mixed_precision", "save_precision", "base_precision",
    "memory_format",
    "enable_xformers_memory_efficient_attention", "compile",
    "gradient_checkpointing", "vram_limit", "seed", "validation_split", "validation_data_dir",
    "eval_steps", "early_stopping_patience", "use_ema",
)  # fmt: skip


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
    optimizer: str = "adamw"
    in_float8: bool = False  # how the UNet is stored
    keeps_best: bool = False  # a copy of the best LoRA, on the CPU
    keeps_average: bool = False  # the EMA of the LoRA, on the device


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
    evaluation: EvaluationConfig
    output: OutputConfig
    explicit: frozenset[str]  # flags that were typed
    argv: tuple[str, ...] = field(default=(), compare=False)

    def resume_command(self) -> str:
        """The command line that resumes a run of this config, in as many processes."""
        return shell.join([*launcher(), "megaman_lora.py", *resume_command(list(self.argv))])

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
            optimizer=self.optimizer.optimizer,
            in_float8=self.compute.base_precision == "fp8",
            keeps_best=self.evaluation.is_on,
            keeps_average=self.evaluation.use_ema,
        )

"""What cannot be meant together on megaman_lora.py's command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from megaman.config.image_settings import BucketConfig, contradiction
from megaman.config.settings import TrainConfig
from megaman.files import path_within

# The folders in --output_dir that a run replaces.
REPLACED = r"((checkpoint|samples)-\d+|lora_weights(_best)?)(?![^/\\])"
# The flags for the same interval, in steps and in epochs.
INTERVALS = (("save_steps", "save_every_n_epochs"), ("validation_steps", "validation_epochs"))
# What is answered in place of a run.
QUESTIONS = ("plan", "check_data", "system_info")
POLYNOMIAL_END = 1e-7  # where diffusers' polynomial schedule ends


def contradictions(config: TrainConfig) -> Iterator[str]:
    """What cannot be meant together. A flag that merely has no effect, such as epochs next to
    steps, or the prompt of sample images next to their number 0, is not an error."""
    if config.run.strict and not config.run.check_data:
        yield "--strict belongs to --check_data: add that or omit it"
    questions = [f"--{name}" for name in QUESTIONS if getattr(config.run, name)]
    if len(questions) > 1:
        yield f"{questions[0]} and {questions[1]} are two questions: ask one at a time"
    if config.output.resume_from_checkpoint and config.output.overwrite_output:
        yield "--resume_from_checkpoint and --overwrite_output contradict each other: use only one"
    for steps, epochs in INTERVALS:
        if {steps, epochs} <= config.explicit:
            yield f"--{steps} and --{epochs} contradict each other: use only one"
    if {"validation_prompt", "validation_prompts_file"} <= config.explicit:
        yield (
            "--validation_prompt and --validation_prompts_file contradict each other: use only one"
        )
    yield from _rate_contradictions(config)
    yield from _crop_contradictions(config)
    yield from _bucket_contradictions(config.buckets, config.data.resolution)
    if "prior_loss_weight" in config.explicit and not config.data.class_data_dir:
        yield _no_effect("prior_loss_weight", "class_data_dir")
    yield from _folder_contradictions(config)
    yield from _evaluation_contradictions(config)


def _no_effect(flag_name: str, required: str) -> str:
    return f"--{flag_name} has no effect without --{required}: add that or omit this"


def _rate_contradictions(config: TrainConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if "text_encoder_lr" in config.explicit and not config.lora.train_text_encoder:
        yield _no_effect("text_encoder_lr", "train_text_encoder")
    text_encoder_lr = optimizer.text_encoder_lr
    if optimizer.optimizer == "prodigy" and text_encoder_lr not in (None, optimizer.learning_rate):
        yield "--optimizer prodigy finds one rate for both models: omit --text_encoder_lr"
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
    if has_warmup and isinstance(total, int) and warmup >= total:
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
    if config.evaluation.validation_data_dir:
        sources["validation_data_dir"] = config.evaluation.validation_data_dir
    for flag_name, folder_name in sources.items():
        if path_within(output_dir, folder_name):
            yield (
                f"--output_dir {output_dir} is within --{flag_name}: its samples would count as "
                "images; name another"
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


def _evaluation_contradictions(config: TrainConfig) -> Iterator[str]:
    evaluation = config.evaluation
    if not evaluation.is_on:
        for flag_name in ("eval_steps", "use_ema"):
            if getattr(evaluation, flag_name):
                yield (
                    f"--{flag_name} has no effect if no image is held out: add --validation_split "
                    "0.1 or --validation_data_dir"
                )
    held_out = evaluation.validation_data_dir
    if held_out is None:
        return
    if evaluation.validation_split is not None:
        yield "--validation_split and --validation_data_dir contradict each other: use only one"
    sources = {"data_dir": config.data.data_dir, "class_data_dir": config.data.class_data_dir}
    for flag_name, source in sources.items():
        if source and (path_within(held_out, source) or path_within(source, held_out)):
            yield (
                f"--validation_data_dir {held_out} and --{flag_name} share images, which would be "
                "trained on and held out: separate them"
            )

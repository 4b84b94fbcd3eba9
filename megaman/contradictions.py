"""What flags of the training cannot mean together, found before anything heavy is imported."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator

from megaman import buckets
from megaman.names import below
from megaman.presets import BUCKET_FLAGS, POLYNOMIAL_END, REPLACED


def contradictions(options: Namespace) -> Iterator[str]:
    """What cannot be meant together. What is merely without effect, such as more steps than epochs, is no mistake."""
    if options.strict and not options.check_data:
        yield "--strict belongs to --check_data: add that or leave it out"
    if options.plan and options.check_data:
        yield "--plan and --check_data are two questions: ask one at a time"
    if options.resume_from_checkpoint and options.overwrite_output:
        yield "--resume_from_checkpoint and --overwrite_output contradict each other: leave one out"
    if options.text_encoder_lr is not None and not options.train_text_encoder:
        yield "--text_encoder_lr has no effect without --train_text_encoder: add that, or leave this out"
    for flag in ("learning_rate", "text_encoder_lr"):
        if options.lr_scheduler == "polynomial" and (getattr(options, flag) or 1) <= POLYNOMIAL_END:
            yield f"--lr_scheduler polynomial falls to {POLYNOMIAL_END:g}: give a higher --{flag}"
    if (
        "lr_warmup_steps" in options.given
        and options.lr_scheduler != "constant"
        and options.max_train_steps
        and options.lr_warmup_steps >= options.max_train_steps
    ):
        yield (
            f"--lr_warmup_steps {options.lr_warmup_steps} is not below --max_train_steps {options.max_train_steps}: "
            "the rate would never be reached; lower the one or raise the other"
        )
    if options.center_crop and options.crop_variants > 1 and "crop_variants" in options.given:
        yield "--center_crop and --crop_variants contradict each other: leave one out"
    for flag in ("cache_dir", "cache_limit", "crop_variants"):
        if options.no_cache and flag in options.given:
            yield f"--no_cache and --{flag} contradict each other: leave one out"
    for flag in BUCKET_FLAGS:
        if getattr(options, flag) and not options.enable_bucket:
            yield f"--{flag} has no effect without --enable_bucket: add that, or leave this out"
    limits = options.resolution, options.min_bucket_reso, options.max_bucket_reso, options.bucket_reso_steps
    if options.enable_bucket and (mistake := buckets.contradiction(*limits)):
        yield ": ".join(mistake)
    if options.num_validation_images == 0:
        for flag in sorted({"validation_steps", "validation_prompt"} & options.given):
            yield f"--{flag} and --num_validation_images 0 contradict each other: leave one out"
    if "prior_loss_weight" in options.given and not options.class_data_dir:
        yield "--prior_loss_weight has no effect without --class_data_dir: add that, or leave this out"
    for flag in ("data_dir", "class_data_dir"):
        if (place := getattr(options, flag)) and below(options.output_dir, place):
            yield f"--output_dir {options.output_dir} is within --{flag}: its samples would be trained on; name another"
    if (own := options.class_data_dir) and (below(own, options.data_dir) or below(options.data_dir, own)):
        yield f"--class_data_dir {own} and --data_dir share pictures, which would be learnt and held back: part them"
    for flag in ("data_dir", "class_data_dir", "logging_dir"):
        place = getattr(options, flag)
        if place and re.match(REPLACED, below(place, options.output_dir) or ""):
            yield f"--{flag} {place} is where the run in --output_dir puts its own: name another"

"""What the header of the kohya file says of its run, in kohya's own keys (ss_*) and in Stability's
(modelspec.*).

A1111 and ComfyUI's managers list a LoRA by them. Every value is a string.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from megaman.data.captions import count_tags, trigger_words

THUMBNAIL_SIDE = 256  # pixels
TIMES = (
    "ss_training_started_at",
    "ss_training_finished_at",
    "modelspec.date",
)  # what two equal runs differ in


def thumbnail(picture: Path) -> str | None:
    """A small JPEG of a picture as a data URL; None where it cannot be read, for it is only an
    adornment."""
    try:
        with Image.open(picture) as image:
            small = image.convert("RGB")
    except (OSError, ValueError):
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    packed = io.BytesIO()
    small.save(packed, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


def _buckets(
    record: Mapping[str, Any] | None, settings: Mapping[str, Any], count: int
) -> dict[str, Any]:
    """What kohya's header tells of buckets; a run without has one, of squares."""
    square = f"{settings['resolution']}x{settings['resolution']}"
    pictures = record["pictures"] if record else {square: count}
    buckets = {
        str(place): {"resolution": [int(side) for side in size.split("x")], "count": count}
        for place, (size, count) in enumerate(pictures.items())
    }
    return {
        "ss_enable_bucket": settings["enable_bucket"],
        "ss_bucket_no_upscale": settings["bucket_no_upscale"],
        "ss_min_bucket_reso": record["min_bucket_reso"] if record else None,
        "ss_max_bucket_reso": record["max_bucket_reso"] if record else None,
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }


def _class_pictures(count: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What kohya's header tells of regularisation pictures."""
    if not count:
        return {"ss_num_reg_images": 0}
    name = Path(settings["class_data_dir"]).resolve().name
    return {
        "ss_num_reg_images": count,
        "ss_prior_loss_weight": settings["prior_loss_weight"],
        "ss_reg_dataset_dirs": json.dumps({name: {"n_repeats": 1, "img_count": count}}),
    }


def training_metadata(
    config: Mapping[str, Any],
    folders: Mapping[str, tuple[int, Sequence[str]]],
    prediction_type: str,
    sample: Path,
    started: float,
    ended: float,
) -> dict[str, str]:
    """The header's part that tells of the run.

    config is the content of training_config.json, folders the repeats and captions of each folder
    by its name, prediction_type the scheduler's word, sample an image drawn with the LoRA (it need
    not exist), started and ended are in seconds since 1970.
    """
    settings = config["settings"]
    captions = [caption for _, own in folders.values() for caption in own]
    count = sum(repeats * len(own) for repeats, own in folders.values())
    size, steps = settings["resolution"], config["total_steps"]
    dirs = {
        name: {"n_repeats": repeats, "img_count": len(own)}
        for name, (repeats, own) in folders.items()
    }
    trigger = settings["trigger_word"] or trigger_words(captions)
    frequency = {name: count_tags(own) for name, (_, own) in folders.items()}
    notes = {
        "ss_num_train_images": count,
        "ss_dataset_dirs": json.dumps(dirs),
        **_class_pictures(config["class_pictures"], settings),
        "ss_tag_frequency": json.dumps(frequency),
        **_buckets(config["buckets"], settings, count),
        "ss_resolution": f"({size}, {size})",
        "ss_steps": steps,
        "ss_max_train_steps": steps,
        "ss_epoch": max(1, round(config["epochs"])),
        "ss_batch_size_per_device": settings["train_batch_size"],
        "ss_gradient_accumulation_steps": settings["gradient_accumulation_steps"],
        "ss_gradient_checkpointing": settings["gradient_checkpointing"],
        "ss_learning_rate": f"{settings['learning_rate']:g}",
        "ss_unet_lr": f"{settings['learning_rate']:g}",
        "ss_text_encoder_lr": f"{settings['text_encoder_lr']:g}"
        if settings["train_text_encoder"]
        else None,
        "ss_lr_scheduler": settings["lr_scheduler"],
        "ss_lr_warmup_steps": config["warmup_steps"],
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_max_grad_norm": settings["max_grad_norm"],
        "ss_min_snr_gamma": settings["snr_gamma"],
        "ss_noise_offset": settings["noise_offset"] or None,
        "ss_flip_aug": settings["random_flip"],
        "ss_random_crop": not settings["center_crop"],
        "ss_shuffle_caption": settings["shuffle_caption"],
        "ss_keep_tokens": settings["keep_tokens"],
        "ss_caption_dropout_rate": settings["caption_dropout_rate"],
        "ss_caption_tag_dropout_rate": settings["caption_tag_dropout_rate"],
        "ss_mixed_precision": {"float16": "fp16", "bfloat16": "bf16"}.get(config["dtype"], "no"),
        "ss_seed": settings["seed"],
        "ss_clip_skip": None,
        "ss_cache_latents": True,
        "ss_training_started_at": int(started),
        "ss_training_finished_at": int(ended),
        "modelspec.date": datetime.fromtimestamp(int(ended), UTC).isoformat(),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(prediction_type, prediction_type),
        "modelspec.description": f"A LoRA trained on {len(captions)} pictures in {steps} steps.",
        "modelspec.tags": ", ".join(list(count_tags(captions))[:20]),
    }
    if trigger:
        notes["modelspec.trigger_phrase"] = trigger
    if picture := thumbnail(sample):
        notes["modelspec.thumbnail"] = picture
    return {
        key: str(value) for key, value in notes.items()
    }  # kohya writes None and False as Python does

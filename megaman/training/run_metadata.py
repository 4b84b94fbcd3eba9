"""The header of kohya's file: what a run was, in kohya's own keys (ss_*) and in Stability's
(modelspec.*).

A1111's and ComfyUI's LoRA managers read them. Every value is a string.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from megaman.data.captions import count_tags, trigger_words

THUMBNAIL_SIDE = 256  # pixels
MAX_LISTED_TAGS = 20
TIMES = (
    "ss_training_started_at",
    "ss_training_finished_at",
    "modelspec.date",
)  # in which two equal runs differ
OPTIMIZER_CLASSES = {
    "adamw": "torch.optim.adamw.AdamW",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "prodigy": "prodigyopt.prodigy.Prodigy",
}
Folders = Mapping[str, tuple[int, Sequence[str]]]  # repeats and captions by the folder's name


def training_metadata(
    config: Mapping[str, Any],
    folders: Sequence[Folders],
    prediction_type: str,
    sample: Path,
    started: float,
    ended: float,
) -> dict[str, str]:
    """The part of the header about the run.

    Args:
        config: the content of training_config.json.
        folders: the images that were trained on, and the class images if there are any.
        prediction_type: of the noise scheduler.
        sample: an image generated with the LoRA, which may be missing.
        started, ended: in seconds since 1970.
    """
    captions = list(chain.from_iterable(texts for _, texts in folders[0].values()))
    metadata = {
        **_data(config, folders),
        **_settings(config),
        "ss_training_started_at": int(started),
        "ss_training_finished_at": int(ended),
        "modelspec.date": datetime.fromtimestamp(int(ended), UTC).isoformat(),
        **_modelspec(config, captions, prediction_type),
    }
    if data_url := thumbnail(sample):
        metadata["modelspec.thumbnail"] = data_url
    # kohya writes None and False as Python does.
    return {key: str(value) for key, value in metadata.items()}


def _data(config: Mapping[str, Any], folders: Sequence[Folders]) -> dict[str, Any]:
    settings, images = config["settings"], folders[0]
    count = _count(images)
    frequency = {name: count_tags(captions) for name, (_, captions) in images.items()}
    return {
        "ss_num_train_images": count,
        "ss_dataset_dirs": _dirs(images),
        **_class_images(folders[1:], settings),
        "ss_tag_frequency": json.dumps(frequency),
        **_buckets(config["buckets"], settings, count),
    }


def _count(folders: Folders) -> int:
    """The images of an epoch, each as often as it is repeated."""
    return sum(repeats * len(captions) for repeats, captions in folders.values())


def _dirs(folders: Folders) -> str:
    """kohya's table of folders."""
    dirs = {
        name: {"n_repeats": repeats, "img_count": len(captions)}
        for name, (repeats, captions) in folders.items()
    }
    return json.dumps(dirs)


def _class_images(folders: Sequence[Folders], settings: Mapping[str, Any]) -> dict[str, Any]:
    """kohya's keys for regularization images."""
    if not folders:
        return {"ss_num_reg_images": 0}
    return {
        "ss_num_reg_images": _count(folders[0]),
        "ss_prior_loss_weight": settings["prior_loss_weight"],
        "ss_reg_dataset_dirs": _dirs(folders[0]),
    }


def _buckets(
    record: Mapping[str, Any] | None, settings: Mapping[str, Any], count: int
) -> dict[str, Any]:
    """kohya's keys for buckets; a run without has one, of squares."""
    square = f"{settings['resolution']}x{settings['resolution']}"
    counts = record["pictures"] if record else {square: count}
    buckets = {
        str(index): {"resolution": [int(side) for side in size.split("x")], "count": count}
        for index, (size, count) in enumerate(counts.items())
    }
    return {
        "ss_enable_bucket": settings["enable_bucket"],
        "ss_bucket_no_upscale": settings["bucket_no_upscale"],
        "ss_min_bucket_reso": record["min_bucket_reso"] if record else None,
        "ss_max_bucket_reso": record["max_bucket_reso"] if record else None,
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    settings, steps = config["settings"], config["total_steps"]
    side, text_encoder_lr = settings["resolution"], None
    if settings["train_text_encoder"]:
        text_encoder_lr = f"{settings['text_encoder_lr']:g}"
    return {
        "ss_resolution": f"({side}, {side})",
        "ss_steps": steps,
        "ss_max_train_steps": steps,
        "ss_epoch": max(1, round(config["epochs"])),
        "ss_batch_size_per_device": settings["train_batch_size"],
        "ss_gradient_accumulation_steps": settings["gradient_accumulation_steps"],
        "ss_gradient_checkpointing": settings["gradient_checkpointing"],
        "ss_learning_rate": f"{settings['learning_rate']:g}",
        "ss_unet_lr": f"{settings['learning_rate']:g}",
        "ss_text_encoder_lr": text_encoder_lr,
        "ss_lr_scheduler": settings["lr_scheduler"],
        "ss_lr_warmup_steps": config["warmup_steps"],
        "ss_optimizer": OPTIMIZER_CLASSES[settings["optimizer"]],
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
    }


def _modelspec(
    config: Mapping[str, Any], captions: Sequence[str], prediction_type: str
) -> dict[str, Any]:
    settings, steps = config["settings"], config["total_steps"]
    side = settings["resolution"]
    metadata = {
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "modelspec.description": f"A LoRA trained on {len(captions)} pictures in {steps} steps.",
        "modelspec.tags": ", ".join(list(count_tags(captions))[:MAX_LISTED_TAGS]),
    }
    if trigger := settings["trigger_word"] or trigger_words(captions):
        metadata["modelspec.trigger_phrase"] = trigger
    return metadata


def thumbnail(path: Path) -> str | None:
    """A small JPEG of an image as a data URL; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # the last is Pillow's, for a broken PNG
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""Settings of training: images, captions, buckets and the latent cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaman.config.cli import flag
from megaman.config.values import (
    MANY,
    PROBABILITY,
    color,
    extension,
    folder,
    number,
    path,
    path_or_name,
    side,
    text,
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
        "mirror images unless a caption says left or right",
        common=True,
        resume=True,
    )
    upscale: str = flag(
        "auto",
        "how small images are enlarged: pixel art by nearest, others by lanczos",
        choices=("auto", "nearest", "lanczos"),
        resume=True,
    )
    background: str = flag(
        "#ffffff",
        "color behind transparent images, by its name or as #rrggbb",
        color,
        metavar="COLOR",
        resume=True,
    )
    alpha_mask: bool = flag(False, "weight the loss by the images' opacity", resume=True)
    dataloader_num_workers: int = flag(0, "processes that decode images", number(int, 0, 64))


@dataclass(frozen=True)
class CaptionConfig:
    """Captions"""

    caption_extension: str | None = flag(
        None,
        "extension of the caption files (default: .txt, if there is none .caption)",
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
        "BLIP or Florence-2 (hub name or folder) writes missing captions",
        path_or_name,
        metavar="MODEL",
        common=True,
    )
    shuffle_caption: bool = flag(
        False, "shuffle the tags between commas at every visit", resume=True
    )
    keep_tokens: int = flag(  # derived if it is not typed
        None,
        "number of first tags that stay in place (default: the trigger word's, or 0)",
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
    cache_limit: float = flag(
        10.0, "size of the cache at most", number(float, 0, MANY), metavar="GB"
    )
    no_cache: bool = flag(
        False, "encode an image again at every visit, with a new random crop each time", resume=True
    )

    def path(self) -> Path | None:
        """The folder of the cache; None with --no_cache, or if the system has no home folder."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = os.path.expanduser(self.cache_dir or os.path.join(home, "megaman_lora"))
        return None if self.no_cache or place.startswith("~") else Path(place)


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

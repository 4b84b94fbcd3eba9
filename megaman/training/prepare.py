"""The base of a run and the latents of its images."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megaman.data import latent_cache
from megaman.data.encoding import drop_damaged, encode_dataset
from megaman.data.latent_cache import LatentCache
from megaman.data.latents import LatentSource, OnlineLatents
from megaman.data.problems import check_usable
from megaman.data.vae_encoder import EncodingConfig, VaeEncoder, identify_vae
from megaman.lora.adapter import check_targets
from megaman.models.base import load_base
from megaman.models.configs import alias_notice, resolve_name
from megaman.models.text_encoding import CaptionEmbeddings, RunTexts, truncated_text
from megaman.training.held_out import ImageSet

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.models.base import Base
    from megaman.training.datasets import Datasets
    from megaman.training.run import Run
    from megaman.training.samples import SamplePlan

GB = 2**30

log = logging.getLogger(__name__)


def open_base(config: TrainConfig, datasets: Datasets, run: Run) -> Base:
    """Open the base, whose models are loaded when they are needed, and sort the images into buckets
    of its size.

    Raises UserError if --target_modules fits none of its layers.
    """
    name = resolve_name(config.base.pretrained_model_name)
    log.info("loading %s", name)
    if notice := alias_notice(config.base.pretrained_model_name):
        log.info("  %s", notice)
    base = load_base(name, run.compute.dtype, run.device, run.compute.torch_memory_format)
    check_targets(base.unet_layers, config.lora.target_modules)
    if config.buckets.enable_bucket:
        datasets.set_buckets(base.native_size, config.buckets)
    return base


def embed_captions(
    base: Base, datasets: Datasets, samples: SamplePlan, config: TrainConfig, run: Run
) -> CaptionEmbeddings:
    """The prompt_embeds of all captions, which the processes share out, and of the sample images'
    prompts."""
    texts = RunTexts(
        datasets.captions, evaluated=datasets.evaluated_captions, prompts=samples.texts
    )
    return CaptionEmbeddings(
        base,
        texts,
        is_varied=config.captions.varies_tags,
        is_trained=config.lora.train_text_encoder,
        processes=run.processes,
    )


class EncodedImages(NamedTuple):
    """The latents of the datasets to train on, and of those that are evaluated."""

    training: list[LatentSource]
    evaluated: list[ImageSet]


def encode_latents(base: Base, datasets: Datasets, config: TrainConfig, run: Run) -> EncodedImages:
    """The latents of all datasets, encoded once and cached, or anew at every visit with --no_cache.

    The processes share out what is to be encoded, or looked through with --no_cache. Images that
    cannot be decoded are dropped and reported. Raises UserError if too few are left.
    """
    encoding = EncodingConfig(
        config.data.crop_variants,
        config.data.random_flip,
        run.state.seed,
        config.data.dataloader_num_workers,
    )
    if config.cache.no_cache:
        latents = _encode_online(base, datasets, encoding, run)
    else:
        latents = _encode_once(base, datasets, encoding, config, run)
    for dataset in datasets.all:
        dataset.set_truncated(truncated_text(base.tokenizer, dataset.captions))
    if run.is_main_process:
        datasets.report_problems(run.output.path)
    check_usable([*datasets.all, *datasets.evaluated[:1]], config.data.skip_bad_images)
    return latents


def _encode_online(
    base: Base, datasets: Datasets, encoding: EncodingConfig, run: Run
) -> EncodedImages:
    encoder = VaeEncoder(base.vae)
    sources: list[LatentSource] = [
        OnlineLatents(encoder, dataset, encoding) for dataset in datasets.all
    ]
    for dataset in datasets.all:
        bar = partial(run.progress_bar, desc="looking", total=len(dataset), unit="image")
        drop_damaged(dataset, run.processes, encoding.num_workers, bar)
    return EncodedImages(sources, _encode_evaluated(base, datasets, None, run))


def _encode_once(
    base: Base, datasets: Datasets, encoding: EncodingConfig, config: TrainConfig, run: Run
) -> EncodedImages:
    """Encode what is missing from the cache, let the VAE go, and prune the cache."""
    cache_dir = config.cache.path()
    vae_id = identify_vae(base, datasets.file_index)
    folder = latent_cache.vae_folder(cache_dir, vae_id) if cache_dir else None
    sources: list[LatentSource] = []
    for dataset in datasets.all:
        bar = partial(run.progress_bar, desc="encoding", total=len(dataset), unit="image")
        cache = LatentCache(folder, run.processes)
        sources.append(
            encode_dataset(lambda: base.vae, dataset, encoding, datasets.file_index, cache, bar)
        )
    evaluated = _encode_evaluated(base, datasets, folder, run)
    base.release("vae")
    if cache_dir and run.is_main_process:
        files = set().union(*(source.files for source in sources))
        latent_cache.prune(cache_dir, config.cache.cache_limit * GB, files)
    return EncodedImages(sources, evaluated)


def _encode_evaluated(
    base: Base, datasets: Datasets, folder: Path | None, run: Run
) -> list[ImageSet]:
    """The latents of the evaluated images: the means of the posteriors of their middles.

    They are encoded after the images to train on, whose batches and so whose bits stay the same.
    """
    sets = []
    for dataset in datasets.evaluated:
        cache = LatentCache(folder, run.processes)
        posteriors = encode_dataset(
            lambda: base.vae, dataset, EncodingConfig(), datasets.file_index, cache
        )
        means = [posteriors[i][0].chunk(2)[0] for i in range(len(posteriors))]
        latents = [mean * base.scaling_factor for mean in means]
        sets.append(ImageSet(latents, dataset.captions))
    return sets

"""Encode the images of a dataset into the cache once, before training; find damaged images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from megaman.data.crop_reader import CropReader
from megaman.data.file_index import FileIndex
from megaman.data.images import BadImageError
from megaman.data.latent_cache import LatentCache
from megaman.data.latents import CachedLatents
from megaman.data.vae_encoder import EncodingConfig, VaeEncoder
from megaman.errors import UserError, summarize_error
from megaman.processes import Processes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from megaman.data.buckets import Size
    from megaman.data.crops import Crop, Rendering
    from megaman.data.dataset import MegaManDataset

MAX_SHARDS = 4096  # per run: each stays mapped, and a system allows some ten thousand mappings
VERSION = 2  # of decoding and scaling: another version gives other latents

Progress = Callable[[Iterable[Any]], Iterable[Any]]  # passes the items on and shows a bar


@dataclass(frozen=True)
class _MissingCrops:
    """The crops of an image that are not in the cache, by key."""

    index: int
    crops: dict[str, Crop]

    def left(self, cache: LatentCache) -> _MissingCrops:
        """Those that are still missing."""
        crops = {key: crop for key, crop in self.crops.items() if key not in cache}
        return _MissingCrops(self.index, crops)


def encode_dataset(
    load_vae: Callable[[], AutoencoderKL],
    dataset: MegaManDataset,
    config: EncodingConfig,
    file_index: FileIndex,
    cache: LatentCache,
    progress: Progress = iter,
) -> CachedLatents:
    """Encode all crops of all images that are missing from the cache.

    Images that cannot be decoded are dropped from the dataset with the reason. load_vae is called
    only if something is missing. Every batch is stored at once, so a stop loses one at most.

    Several processes, all of which have to call this, share out what is missing. What one of them
    does not find in the cache afterwards it encodes itself: on another machine's disk, perhaps, or
    if the folder cannot be written.

    Workers may be spawned: the dataset is pickled for them. More workers than cores would only slow
    each other down.
    """
    keys, missing = _find_missing(dataset, config, file_index, cache)
    cache.processes.exchange(None)  # none adds to the cache while another looks what is missing
    own = cache.processes.share(missing)
    reasons = _encode_missing(load_vae, dataset, own, cache, config, progress) if own else {}
    if cache.processes.count > 1:
        reasons |= _join_shares(cache, reasons)
        left = [one.left(cache) for one in missing if one.index not in reasons]
        if left := [one for one in left if one.crops]:
            reasons |= _encode_missing(load_vae, dataset, left, cache, config, progress)
    # A copy of a damaged image was not decoded, but its latents are missing all the same.
    bad = {
        index
        for index, image_keys in enumerate(keys)
        if not all(key in cache for key in image_keys)
    }
    any_reason = next(iter(reasons.values()), "")
    dataset.drop(
        {dataset.examples[index].image: reasons.get(index, any_reason) for index in sorted(bad)}
    )
    keys = [image_keys for index, image_keys in enumerate(keys) if index not in bad]
    num_new = sum(len(one.crops) for one in missing if one.index not in bad)
    return CachedLatents(cache, keys, num_new)


def _find_missing(
    dataset: MegaManDataset, config: EncodingConfig, file_index: FileIndex, cache: LatentCache
) -> tuple[list[list[str]], list[_MissingCrops]]:
    """The keys of every image's crops, and the crops that are not in the cache, each once."""
    keys: list[list[str]] = []
    missing: list[_MissingCrops] = []
    missing_keys: set[str] = set()
    for index, digest in enumerate(dataset.hash_files(file_index)):
        crops = {
            _key(digest, crop, dataset.rendering): crop
            for crop in dataset.get_crops(index, config.num_crops, config.flip, config.seed)
        }
        keys.append(list(crops))
        new = {
            key: crop for key, crop in crops.items() if key not in cache and key not in missing_keys
        }
        if new:
            missing_keys |= new.keys()
            missing.append(_MissingCrops(index, new))
    return keys, missing


def _join_shares(cache: LatentCache, reasons: dict[int, str]) -> dict[int, str]:
    """Wait for the shares of all processes and look for them in the cache; returns why images could
    not be decoded in any of them, by index."""
    together: dict[int, str] = {}
    for share in cache.processes.exchange(reasons):
        together |= share
    cache.find_shards()
    return together


def _encode_missing(
    load_vae: Callable[[], AutoencoderKL],
    dataset: MegaManDataset,
    missing: Sequence[_MissingCrops],
    cache: LatentCache,
    config: EncodingConfig,
    progress: Progress,
) -> dict[int, str]:
    """Encode these crops into the cache, in batches of one size; returns why images could not be
    decoded, by index."""
    encoder = VaeEncoder(load_vae())
    num_workers = min(config.num_workers, _usable_cores())
    reader = CropReader(dataset, [(one.index, list(one.crops.values())) for one in missing])
    loader = DataLoader(reader, batch_size=None, num_workers=num_workers)
    # A run makes at most MAX_SHARDS shards.
    min_batch = -(-sum(len(one.crops) for one in missing) // MAX_SHARDS)
    reasons: dict[int, str] = {}
    pending: dict[Size, dict[str, torch.Tensor]] = {}
    for one, loaded in zip(missing, progress(_from_workers(loader)), strict=True):
        if isinstance(loaded, str):
            reasons[one.index] = loaded
            continue
        for (key, crop), pixel_values in zip(one.crops.items(), loaded, strict=True):
            batch = pending.setdefault(crop.size, {})
            batch[key] = pixel_values
            if len(batch) >= max(min_batch, encoder.batch_size(crop.size)):
                _store(encoder, pending.pop(crop.size), cache)
    for batch in pending.values():
        _store(encoder, batch, cache)
    return reasons


def _store(encoder: VaeEncoder, batch: dict[str, torch.Tensor], cache: LatentCache) -> None:
    """Encode crops of one size into the cache as one shard."""
    latents = encoder.encode(torch.stack(list(batch.values()))).cpu()
    cache.add(dict(zip(batch, latents, strict=True)))


def _from_workers(loader: DataLoader) -> Iterator[list[torch.Tensor] | str]:
    """The loader's items; a worker that was killed, for example for lack of memory, raises
    UserError."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A worker that decodes images died ({summarize_error(error)})",
            "Use fewer of them, or none: --dataloader_num_workers 0",
        ) from None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _key(digest: bytes, crop: Crop, rendering: Rendering) -> str:
    """What the latents of a crop depend on besides the VAE: the image's bytes, the crop and how it
    is rendered."""
    text = f"{VERSION} {digest.hex()} {crop.box} {crop.size} {crop.mirrored}"
    if crop.cell:
        text += f" nearest {crop.cell}"
    text += rendering.key()
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def drop_damaged(
    dataset: MegaManDataset,
    processes: Processes,
    num_threads: int,
    progress: Progress = iter,
) -> None:
    """Decode every image once, in one of the processes, and drop the damaged ones, which would stop
    the run later."""

    def find_damage(index: int) -> str | None:
        try:
            dataset.load_crops(index, dataset.get_crops(index, 1, False, 0))
        except BadImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        own = processes.share(range(len(dataset)))
        damage = dict(zip(own, progress(pool.map(find_damage, own)), strict=True))
    examples, reasons = dataset.examples, {}
    for share in processes.exchange(damage):
        reasons |= {examples[index].image: reason for index, reason in share.items() if reason}
    dataset.drop(reasons)

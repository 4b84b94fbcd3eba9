"""Where training gets the latents of its images: encoded once by the frozen VAE, before the loop,
and cached for later runs; or, without a cache, encoded at every visit with a new random crop.

Latents here are the parameters of the VAE's posterior, mean and log variance, float32
[8, h, w]; a training step samples from them.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from megaman.data.file_index import FileIndex
from megaman.data.images import BadImageError
from megaman.data.latent_cache import LatentCache, Location
from megaman.errors import UserError, summarize_error
from megaman.files import stamp_of
from megaman.models.base import vae_identity, vae_scale_factor
from megaman.runtime import retry_on_oom

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from megaman.data.buckets import Size
    from megaman.data.dataset import Crop, MegaManDataset
    from megaman.models.base import Base

# Pixels in one batch of the VAE: more are not faster, but need more memory. A GPU wants larger
# batches than a CPU.
MAX_PIXELS_CUDA = 4 * 512 * 512
MAX_PIXELS_OTHERS = 512 * 512
MAX_BATCH_SIZE = 64
MAX_SHARDS = 4096  # per run: each stays mapped, and a system allows some ten thousand mappings
VERSION = 1  # of decoding and scaling: another version gives other latents

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodingConfig:
    """Which crops of an image are encoded, and how.

    Args:
        num_crops: random crops per image, for cached latents.
        flip: whether every crop is also mirrored.
        seed: the crops depend on it.
        num_workers: processes or threads that decode images, next to the main one.
    """

    num_crops: int = 1
    flip: bool = False
    seed: int = 0
    num_workers: int = 0


class LatentSource(Protocol):
    """The latents of a dataset's images, by their index in the dataset."""

    @property
    def total_crops(self) -> int | None:
        """The number of crops of all images; None if every visit has its own."""
        ...

    @property
    def files(self) -> set[Path]:
        """The files of the cache that this run uses."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def num_crops(self, index: int) -> int:
        """The number of crops of an image; a mirror image counts as a crop of its own."""
        ...

    def latent_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image's latents."""
        ...

    def prefetch(self, samples: Sequence[tuple[int, int]]) -> None:
        """Start to prepare these samples, pairs of sample index and image index, and drop all
        others."""
        ...

    def get_batch(
        self, sample_indices: Sequence[int], indices: Sequence[int], crop_indices: Sequence[int]
    ) -> torch.Tensor:
        """The latents [B, 8, h, w] of one crop of each image, on any device.

        sample_indices are the samples' positions in the run, indices the images, crop_indices which
        of their crops.
        """
        ...

    def summary(self) -> list[str]:
        """What was encoded and where it is cached, as lines to print."""
        ...


class CachedLatents:
    """A LatentSource of crops that are all in a LatentCache.

    Args:
        keys: the keys of every image's crops, in the order of the dataset.
        num_new: how many crops this run had to encode.
    """

    def __init__(self, cache: LatentCache, keys: Iterable[list[str]], num_new: int):
        self._cache = cache
        self._num_new = num_new
        # Arrays of numbers: with 100,000 images, an object per crop would need more memory than
        # everything else.
        self._starts = array("q", [0])  # of each image's crops
        self._shards = array("l")
        self._offsets = array("q")
        self._shapes: list[tuple[int, ...]] = []
        for image_keys in keys:
            for location in map(cache.location, image_keys):
                self._shards.append(location.shard)
                self._offsets.append(location.offset)
                self._shapes.append(location.shape)
            self._starts.append(len(self._shards))
        cache.forget_keys()
        self._files = cache.use_shards(set(self._shards))

    @property
    def total_crops(self) -> int | None:
        return len(self._shards)

    @property
    def files(self) -> set[Path]:
        return self._files

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        """The latents of all crops of an image, [crops, 8, h, w]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return torch.stack([self._crop(index, i) for i in range(self.num_crops(index))])

    def num_crops(self, index: int) -> int:
        return self._starts[index + 1] - self._starts[index]

    def latent_size(self, index: int) -> tuple[int, int]:
        _, height, width = self._shapes[self._starts[index]]
        return height, width

    def prefetch(self, samples: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: all latents are in memory or memory-mapped."""

    def get_batch(
        self, sample_indices: Sequence[int], indices: Sequence[int], crop_indices: Sequence[int]
    ) -> torch.Tensor:
        return torch.stack(
            [self._crop(index, i) for index, i in zip(indices, crop_indices, strict=True)]
        )

    def summary(self) -> list[str]:
        total, folder = len(self._shards), self._cache.cache_dir
        if folder is None:
            return [f"encoded    {total}, kept in memory"]
        if self._cache.write_error:
            reason = f"{folder} cannot be written ({self._cache.write_error})"
            return [f"encoded    {total}, kept in memory: {reason}"]
        return [f"encoded    {self._num_new} now, {total - self._num_new} were in {folder}"]

    def _crop(self, index: int, crop_index: int) -> torch.Tensor:
        i = self._starts[index] + crop_index
        return self._cache.read(Location(self._shards[i], self._offsets[i], self._shapes[i]))


class VaeEncoder:
    """Encodes images of one size in batches: smaller ones, and then in tiles, if memory is
    short."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        is_cuda = vae.device.type == "cuda"
        self._max_pixels = MAX_PIXELS_CUDA if is_cuda else MAX_PIXELS_OTHERS

    def batch_size(self, size: Size) -> int:
        """How many images of this size in pixels are encoded together."""
        return min(MAX_BATCH_SIZE, max(1, self._max_pixels // (size[0] * size[1])))

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Latents, float32 [B, 8, h, w] on the VAE's device, of images [B, 3, H, W].

        Raises UserError if even a single tile does not fit into memory.
        """
        return retry_on_oom(partial(self._encode, pixel_values), self._reduce_memory)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = pixel_values.shape[2:]
        parts = pixel_values.split(self.batch_size((width, height)))
        parts = [part.to(self.vae.device, self.vae.dtype, non_blocking=True) for part in parts]
        return torch.cat([self.vae.encode(part).latent_dist.parameters.float() for part in parts])

    def _reduce_memory(self) -> None:
        if self._max_pixels > 1:
            self._max_pixels = 1
        elif not self.vae.use_tiling:
            self.vae.enable_tiling()
        else:
            raise UserError(
                "The VAE needs more memory than there is",
                "Lower --resolution, or close other programs",
            )


def identify_vae(base: Base, file_index: FileIndex) -> str:
    """The identity of the base's VAE: from the file index, or else computed, for which the VAE is
    loaded."""
    files = [(path, stamp_of(path)) for path in base.vae_files()]
    known = {file_index.get(path, stamp) for path, stamp in files}
    if len(known) == 1 and (identity := known.pop()):
        return identity
    identity = vae_identity(base.vae)
    file_index.update((path, stamp, identity) for path, stamp in files)
    return identity


@dataclass(frozen=True)
class _MissingCrops:
    """The crops of an image that are not in the cache, by key."""

    index: int
    crops: dict[str, Crop]


def encode_dataset(
    load_vae: Callable[[], AutoencoderKL],
    dataset: MegaManDataset,
    config: EncodingConfig,
    file_index: FileIndex,
    cache: LatentCache,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = iter,
) -> CachedLatents:
    """Encode all crops of all images that are missing from the cache.

    Images that cannot be decoded are dropped from the dataset with the reason. load_vae is called
    only if something is missing. Every batch is stored at once, so a stop loses one at most.

    Workers may be spawned: the dataset is pickled for them. More workers than cores would only slow
    each other down.
    """
    keys, missing = _find_missing(dataset, config, file_index, cache)
    reasons: dict[int, str] = {}
    if missing:
        reasons = _encode_missing(VaeEncoder(load_vae()), dataset, missing, cache, config, progress)
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
    new_keys = {key for one in missing if one.index not in bad for key in one.crops}
    return CachedLatents(cache, keys, len(new_keys))


def _find_missing(
    dataset: MegaManDataset, config: EncodingConfig, file_index: FileIndex, cache: LatentCache
) -> tuple[list[list[str]], list[_MissingCrops]]:
    """The keys of every image's crops, and the crops that are not in the cache, each once."""
    keys: list[list[str]] = []
    missing: list[_MissingCrops] = []
    missing_keys: set[str] = set()
    for index, digest in enumerate(dataset.hash_files(file_index)):
        crops = {
            _key(digest, crop): crop
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


def _encode_missing(
    encoder: VaeEncoder,
    dataset: MegaManDataset,
    missing: Sequence[_MissingCrops],
    cache: LatentCache,
    config: EncodingConfig,
    progress: Callable[[Iterable[Item]], Iterable[Item]],
) -> dict[int, str]:
    """Encode these crops into the cache, in batches of one size; returns why images could not be
    decoded, by index."""
    num_workers = min(config.num_workers, _usable_cores())
    loader = DataLoader(_CropReader(dataset, missing), batch_size=None, num_workers=num_workers)
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


class _CropReader(Dataset):
    """Loads the missing crops of each image; for a damaged image, the reason in place of an
    exception."""

    def __init__(self, dataset: MegaManDataset, missing: Sequence[_MissingCrops]):
        self._dataset = dataset
        self._requests = [(one.index, list(one.crops.values())) for one in missing]

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, i: int) -> list[torch.Tensor] | str:
        try:
            return self._dataset.load_crops(*self._requests[i])
        except BadImageError as error:
            return str(error)


def _from_workers(loader: DataLoader) -> Iterator[list[torch.Tensor] | str]:
    """The loader's items; a worker that was killed, for example for lack of memory, raises
    UserError."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A worker that decodes pictures died ({summarize_error(error)})",
            "Use fewer of them, or none: --dataloader_num_workers 0",
        ) from None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _key(digest: bytes, crop: Crop) -> str:
    """What the latents of a crop depend on besides the VAE: the image's bytes and the crop."""
    text = f"{VERSION} {digest.hex()} {crop.box} {crop.size} {crop.mirrored}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def drop_damaged(
    dataset: MegaManDataset,
    num_threads: int,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = iter,
) -> None:
    """Decode every image once and drop the damaged ones, which would stop the run later."""

    def find_damage(index: int) -> str | None:
        try:
            dataset.load_crops(index, dataset.get_crops(index, 1, False, 0))
        except BadImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        damage = list(progress(pool.map(find_damage, range(len(dataset)))))
    pairs = zip(dataset.examples, damage, strict=True)
    dataset.drop({example.image: reason for example, reason in pairs if reason})


class OnlineLatents:
    """A LatentSource that encodes images when they are asked for.

    The crop depends on the seed and the sample index. Threads decode images ahead of time, since
    Pillow releases the GIL while it decodes; for a GPU the pixels wait in pinned memory.
    """

    def __init__(self, encoder: VaeEncoder, dataset: MegaManDataset, config: EncodingConfig):
        self._encoder, self._dataset, self._config = encoder, dataset, config
        self._factor = vae_scale_factor(encoder.vae)
        self._pin_memory = encoder.vae.device.type == "cuda"
        num_threads = max(1, config.num_workers)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decoding")
        self._pending: dict[int, Future[torch.Tensor]] = {}  # by sample index

    @property
    def total_crops(self) -> int | None:
        return None

    @property
    def files(self) -> set[Path]:
        return set()

    def __len__(self) -> int:
        return len(self._dataset)

    def num_crops(self, index: int) -> int:
        """Two if the image may be mirrored: itself and its mirror image."""
        return 2 if self._config.flip and self._dataset.can_flip(index) else 1

    def latent_size(self, index: int) -> tuple[int, int]:
        width, height = self._dataset.get_crops(index, 1, False, 0)[0].size
        return height // self._factor, width // self._factor

    def prefetch(self, samples: Sequence[tuple[int, int]]) -> None:
        self._pending = {
            sample_index: self._pending.get(sample_index) or self._submit(sample_index, index)
            for sample_index, index in samples
        }

    def get_batch(
        self, sample_indices: Sequence[int], indices: Sequence[int], crop_indices: Sequence[int]
    ) -> torch.Tensor:
        """The latents [B, 8, h, w] on the VAE's device; crop index 1 is the mirror image.

        Raises UserError if an image cannot be decoded anymore.
        """
        for sample_index, index in zip(sample_indices, indices, strict=True):
            if sample_index not in self._pending:
                self._pending[sample_index] = self._submit(sample_index, index)
        pixel_values = []
        for sample_index, index, i in zip(sample_indices, indices, crop_indices, strict=True):
            crop = self._wait_for(sample_index, index)
            pixel_values.append(crop.flip(-1) if i else crop)
        return self._encoder.encode(torch.stack(pixel_values))

    def summary(self) -> list[str]:
        return []

    def _submit(self, sample_index: int, index: int) -> Future[torch.Tensor]:
        return self._threads.submit(self._load, sample_index, index)

    def _load(self, sample_index: int, index: int) -> torch.Tensor:
        seed = f"{self._config.seed} visit {sample_index}"
        crops = self._dataset.get_crops(index, 1, False, seed)
        pixel_values = self._dataset.load_crops(index, crops)[0]
        return pixel_values.pin_memory() if self._pin_memory else pixel_values

    def _wait_for(self, sample_index: int, index: int) -> torch.Tensor:
        try:
            return self._pending[sample_index].result()
        except BadImageError as error:
            path = self._dataset.examples[index].image
            remedy = "Restore it and resume with --resume_from_checkpoint latest"
            raise UserError(f"{path}: {error}", remedy) from None

"""Where training gets the latents of its images: encoded once by the frozen VAE, before the loop,
and cached for later runs; or, without a cache, encoded at every visit with a new random crop.

Latents here are the parameters of the VAE's posterior, mean and log variance, float32
[8, h, w]; a training step samples from them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from megaman.data.images import BadImageError
from megaman.data.latent_cache import LatentCache, Location
from megaman.data.vae_encoder import EncodingConfig, VaeEncoder
from megaman.errors import UserError
from megaman.models.base import vae_scale_factor

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset


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


class OnlineLatents:
    """A LatentSource that encodes images when they are asked for.

    The crop depends on the seed and the sample index. Threads decode images ahead of time, since
    Pillow releases the GIL while it decodes.
    """

    def __init__(self, encoder: VaeEncoder, dataset: MegaManDataset, config: EncodingConfig):
        self._encoder, self._dataset, self._config = encoder, dataset, config
        self._factor = vae_scale_factor(encoder.vae)
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
        return self._dataset.load_crops(index, crops)[0]

    def _wait_for(self, sample_index: int, index: int) -> torch.Tensor:
        try:
            return self._pending[sample_index].result()
        except BadImageError as error:
            path = self._dataset.examples[index].image
            remedy = "Restore it and resume with --resume_from_checkpoint latest"
            raise UserError(f"{path}: {error}", remedy) from None

"""A cache of VAE latents by key: safetensors shards on disk, memory-mapped and shared by runs, or
memory alone.

What is cached is the mean and the log variance of the VAE's posterior, of which a training step
samples its latents: float32 [8, h, w], diffusers' `latent_dist.parameters`.

CACHE_DIR/moments/VAE/SHARD.safetensors: a shard holds one batch of the VAE and is either complete
or absent. Two runs that fill the cache at the same time write shards of their own; what both
compute is the same. The pages that are read belong to the operating system, which evicts them when
memory is needed.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megaman.errors import UserError, summarize_error
from megaman.files import ASIDE, replacing
from megaman.processes import Processes
from megaman.safe_loading import read_header

FOLDER, SUFFIX = "moments", ".safetensors"
ABANDONED = 24 * 3600  # seconds after which an unfinished file has no writer anymore
FLOAT32 = 4  # bytes
MAX_READS = 128  # before the shards are mapped again


class Location(NamedTuple):
    """Where latents are stored: the number of the shard, their offset in it, in floats, and their
    shape."""

    shard: int
    offset: int
    shape: tuple[int, ...]


class LatentCache:
    """The shards of one VAE.

    folder is the VAE's own (`vae_folder`), or None to keep everything in memory. If it cannot be
    written, whatever is added from then on stays in memory, and write_error says why. processes are
    those that fill it together.
    """

    def __init__(self, folder: Path | None, processes: Processes | None = None):
        self.folder, self.write_error = folder, ""
        self.processes = processes or Processes()
        self._tensors: list[torch.Tensor] = []  # one per shard, flat and memory-mapped
        self._files: list[Path | None] = []
        self._locations: dict[str, Location] = {}
        self._read_shards: list[int] = []  # since they were last mapped
        self.find_shards()

    def find_shards(self) -> None:
        """Add the shards that have come into the folder since it was last looked through."""
        known = set(self._files)
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder else []:
            if path not in known:
                self._map(path)

    @property
    def cache_dir(self) -> Path | None:
        """The folder that holds the caches of all VAEs."""
        return self.folder.parents[1] if self.folder else None

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    def location(self, key: str) -> Location:
        """Where the latents of this key are; raises KeyError if they are missing."""
        return self._locations[key]

    def read(self, location: Location) -> torch.Tensor:
        """A copy of the latents at a location, float32 [8, h, w]."""
        shard, offset, shape = location
        end = offset + math.prod(shape)
        latents = self._tensors[shard][offset:end].view(shape).clone()
        self._read_shards.append(shard)
        if len(self._read_shards) >= MAX_READS:
            self._remap()
        return latents

    def _remap(self) -> None:
        """Map the shards again that were read: their pages count as memory of this process until
        the mapping is closed.

        A shard that was deleted in the meantime stays mapped, and so remains readable for this run.
        """
        for shard in set(self._read_shards):
            file = self._files[shard]
            with contextlib.suppress(OSError, RuntimeError):
                if file and file.stat().st_size == self._tensors[shard].nbytes:
                    self._tensors[shard] = _mapped(file)
        self._read_shards.clear()

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store these tensors as one shard."""
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if self.folder and not self.write_error:
            path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
            try:
                with replacing(path) as aside:
                    save_file(tensors, aside)
            except (OSError, SafetensorError) as error:
                self.write_error = summarize_error(error)
            else:
                self._map(path)
        if not tensors.keys() <= self._locations.keys():
            self._keep_in_memory(tensors)

    def _keep_in_memory(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            self._locations[key] = Location(len(self._tensors), 0, tuple(tensor.shape))
            self._tensors.append(tensor.flatten())
            self._files.append(None)

    def forget_keys(self) -> None:
        """Free the memory of the keys, 40 MB for 100,000; known locations can still be read."""
        self._locations = {}

    def use_shards(self, shards: Iterable[int]) -> set[Path]:
        """The files of these shards, which are marked as just used."""
        files = {file for shard in shards if (file := self._files[shard])}
        for file in files:
            with contextlib.suppress(OSError):
                os.utime(file)
        return files

    def _map(self, path: Path) -> None:
        """Add a shard; one that is damaged, or that another run is deleting, counts as missing."""
        try:
            header, start = read_header(path)
            if any(entry["dtype"] != "F32" for entry in header.values()) or start % FLOAT32:
                return
            self._tensors.append(_mapped(path))
        except (OSError, RuntimeError, UserError):
            return
        self._files.append(path)
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal shapes share one object
        for key, entry in header.items():
            shape = tuple(entry["shape"])
            offset = (start + entry["data_offsets"][0]) // FLOAT32
            location = Location(len(self._tensors) - 1, offset, shapes.setdefault(shape, shape))
            self._locations.setdefault(key, location)


def _mapped(path: Path) -> torch.Tensor:
    count = path.stat().st_size // FLOAT32
    return torch.from_file(str(path), shared=False, size=count, dtype=torch.float32)


def vae_folder(cache_dir: Path, vae_id: str) -> Path:
    """Where the latents of the VAE with this identity are cached."""
    return cache_dir / FOLDER / vae_id[:32]


def prune(cache_dir: Path, max_bytes: float, in_use: set[Path]) -> None:
    """Delete the least recently used shards until at most max_bytes are left, but none in use.

    Another run that has such a shard mapped can go on reading it if the system allows a mapped file
    to be deleted; Windows does not, and the shard stays.
    """
    shards = []
    for path in (cache_dir / FOLDER).glob("*/*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.name.endswith(ASIDE) and time.time() - status.st_mtime > ABANDONED:
                path.unlink()
            elif path.suffix == SUFFIX:
                shards.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if total <= max_bytes:
            break
        if path not in in_use:
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size

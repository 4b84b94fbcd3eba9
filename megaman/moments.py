"""VAE moments by key: in safetensors shards on the disk, memory-mapped and shared by runs, or else in memory.

CACHE_DIR/moments/VAE/SHARD.safetensors; a shard holds what one batch of the VAE gave, and is there whole or not at all.
Two runs that fill the cache at once write shards of their own; what both hold is the same. Pages that are read belong
to the system, which drops them when memory is wanted.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megaman.errors import UserError, brief
from megaman.files import ASIDE, replacing
from megaman.safety import read_header

FOLDER, SUFFIX = "moments", ".safetensors"
FORSAKEN = 24 * 3600  # seconds after which a file that is still being written has no writer any more
FLOAT32 = 4  # bytes


class Moments:
    """The shards of one VAE: store[key] is float32 [8, h, w].

    folder is the VAE's own (folder_of), or None to keep everything in memory. Where it cannot be written to, what is
    added from there on stays in memory, and refused says why.
    """

    def __init__(self, folder: Path | None):
        self.folder, self.refused = folder, ""
        self._numbers: list[torch.Tensor] = []  # a shard's, flat and mapped
        self._files: list[Path | None] = []
        self._places: dict[str, tuple[int, int, tuple[int, ...]]] = {}  # shard, first number, shape
        for path in sorted(folder.glob(f"*{SUFFIX}")) if folder else []:
            self._map(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> torch.Tensor:
        shard, first, shape = self._places[key]
        return self._numbers[shard][first : first + torch.Size(shape).numel()].view(shape)

    def shape(self, key: str) -> tuple[int, ...]:
        """The same without a look at the numbers."""
        return self._places[key][2]

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep these as one shard."""
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if self.folder and not self.refused:
            path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
            try:
                with replacing(path) as aside:
                    save_file(tensors, aside)
            except (OSError, SafetensorError) as error:
                self.refused = brief(error)
            else:
                self._map(path)
        if not tensors.keys() <= self._places.keys():
            for key, tensor in tensors.items():
                self._places[key] = (len(self._numbers), 0, tuple(tensor.shape))
                self._numbers.append(tensor.flatten())
                self._files.append(None)

    def keep_only(self, keys: Iterable[str]) -> None:
        """Forget all others, and mark the shards of these as used now."""
        self._places = {key: self._places[key] for key in keys}
        for file in self.files():
            with contextlib.suppress(OSError):
                os.utime(file)

    def files(self) -> set[Path]:
        """The shards that hold what is known."""
        return {file for shard in {place[0] for place in self._places.values()} if (file := self._files[shard])}

    def _map(self, path: Path) -> None:
        """Take in a shard; one that is damaged, or that another run deletes just now, is as if it were not there."""
        try:
            header, start = read_header(path)
            if any(entry["dtype"] != "F32" for entry in header.values()) or start % FLOAT32:
                return
            count = path.stat().st_size // FLOAT32
            self._numbers.append(torch.from_file(str(path), shared=False, size=count, dtype=torch.float32))
        except (OSError, RuntimeError, UserError):
            return
        self._files.append(path)
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for all that are equal
        for key, entry in header.items():
            shape = tuple(entry["shape"])
            first = (start + entry["data_offsets"][0]) // FLOAT32
            self._places.setdefault(key, (len(self._numbers) - 1, first, shapes.setdefault(shape, shape)))


def folder_of(cache_dir: Path, vae: str) -> Path:
    """Where the moments of the VAE with this identity are."""
    return cache_dir / FOLDER / vae[:32]


def prune(cache_dir: Path, limit: float, in_use: set[Path]) -> None:
    """Delete the shards that were not used for longest until the rest has at most limit bytes; never those in use.

    A run that has such a shard mapped goes on with it where the system allows a mapped file to be deleted; Windows does
    not, and the shard stays.
    """
    found = []
    for path in (cache_dir / FOLDER).glob("*/*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.name.endswith(ASIDE) and time.time() - status.st_mtime > FORSAKEN:
                path.unlink()
            elif path.suffix == SUFFIX:
                found.append((status.st_mtime, status.st_size, path))
    size = sum(bytes_ for _, bytes_, _ in found)
    for _, bytes_, path in sorted(found):
        if size <= limit:
            break
        if path not in in_use:
            with contextlib.suppress(OSError):
                path.unlink()
                size -= bytes_

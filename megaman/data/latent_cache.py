"""VAE moments by key: in safetensors shards on the disk, memory-mapped and shared by runs, or else
in memory.

CACHE_DIR/moments/VAE/SHARD.safetensors; a shard holds what one batch of the VAE gave, and is there
whole or not at all. Two runs that fill the cache at once write shards of their own; what both hold
is the same. Pages that are read belong to the system, which drops them when memory is wanted.
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
from megaman.safe_loading import read_header

FOLDER, SUFFIX = "moments", ".safetensors"
FORSAKEN = (
    24 * 3600
)  # seconds after which a file that is still being written has no writer any more
FLOAT32 = 4  # bytes
READS = 128  # after which shards are mapped anew


class Place(NamedTuple):
    """Where moments are: their shard's number, their first number in it, their shape."""

    shard: int
    first: int
    shape: tuple[int, ...]


class Moments:
    """The shards of one VAE.

    folder is the VAE's own (folder_of), or None to keep everything in memory. Where it cannot be
    written to, what is added from there on stays in memory, and refused says why.
    """

    def __init__(self, folder: Path | None):
        self.folder, self.refused = folder, ""
        self._numbers: list[torch.Tensor] = []  # a shard's, flat and mapped
        self._files: list[Path | None] = []
        self._places: dict[str, Place] = {}
        self._read_from: list[int] = []  # shards, since they were mapped anew
        for path in sorted(folder.glob(f"*{SUFFIX}")) if folder else []:
            self._map(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def place(self, key: str) -> Place:
        """Raises KeyError where they are not there."""
        return self._places[key]

    def read(self, place: Place) -> torch.Tensor:
        """A copy of the moments at a place, float32 [8, h, w]."""
        shard, first, shape = place
        numbers = self._numbers[shard][first : first + math.prod(shape)].view(shape).clone()
        self._read_from.append(shard)
        if len(self._read_from) >= READS:
            self._let_go()
        return numbers

    def _let_go(self) -> None:
        """Map anew what was read from: a page that was read counts as this process's memory until
        its mapping goes.

        A shard that was deleted by now stays mapped, and so remains whole for this run.
        """
        for shard in set(self._read_from):
            file = self._files[shard]
            with contextlib.suppress(OSError, RuntimeError):
                if file and file.stat().st_size == self._numbers[shard].nbytes:
                    self._numbers[shard] = _mapped(file)
        self._read_from.clear()

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep these as one shard."""
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        if self.folder and not self.refused:
            path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
            try:
                with replacing(path) as aside:
                    save_file(tensors, aside)
            except (OSError, SafetensorError) as error:
                self.refused = summarize_error(error)
            else:
                self._map(path)
        if not tensors.keys() <= self._places.keys():
            for key, tensor in tensors.items():
                self._places[key] = Place(len(self._numbers), 0, tuple(tensor.shape))
                self._numbers.append(tensor.flatten())
                self._files.append(None)

    def forget_keys(self) -> None:
        """Free the memory of the keys, of which 100,000 take 40 MB; what was asked for can still be
        read."""
        self._places = {}

    def files_of(self, shards: Iterable[int]) -> set[Path]:
        """These shards' files, which are marked as used now."""
        files = {file for shard in shards if (file := self._files[shard])}
        for file in files:
            with contextlib.suppress(OSError):
                os.utime(file)
        return files

    def _map(self, path: Path) -> None:
        """Take in a shard; one that is damaged, or that another run deletes just now, is as if it
        were not there."""
        try:
            header, start = read_header(path)
            if any(entry["dtype"] != "F32" for entry in header.values()) or start % FLOAT32:
                return
            self._numbers.append(_mapped(path))
        except (OSError, RuntimeError, UserError):
            return
        self._files.append(path)
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for all that are equal
        for key, entry in header.items():
            shape = tuple(entry["shape"])
            first = (start + entry["data_offsets"][0]) // FLOAT32
            place = Place(len(self._numbers) - 1, first, shapes.setdefault(shape, shape))
            self._places.setdefault(key, place)


def _mapped(path: Path) -> torch.Tensor:
    count = path.stat().st_size // FLOAT32
    return torch.from_file(str(path), shared=False, size=count, dtype=torch.float32)


def folder_of(cache_dir: Path, vae: str) -> Path:
    """Where the moments of the VAE with this identity are."""
    return cache_dir / FOLDER / vae[:32]


def prune(cache_dir: Path, limit: float, in_use: set[Path]) -> None:
    """Delete the shards that were not used for longest until the rest has at most limit bytes;
    never those in use.

    A run that has such a shard mapped goes on with it where the system allows a mapped file to be
    deleted; Windows does not, and the shard stays.
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

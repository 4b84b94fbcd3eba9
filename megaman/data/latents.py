"""What the frozen VAE says about each picture: computed once, before the loop, and kept for later
runs; or, without a cache, anew at every visit, with a new random crop each time."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from megaman.data.file_index import Stamps
from megaman.data.images import BadImageError
from megaman.data.latent_cache import Moments, Place
from megaman.errors import UserError, summarize_error
from megaman.files import stamp_of
from megaman.models.base import vae_identity
from megaman.runtime import retry_on_oom

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from megaman.data.buckets import Size
    from megaman.data.dataset import Form, MegaManDataset
    from megaman.models.base import Base

# In the VAE together: more do not make it faster, but take more memory. A card wants more to do
# than a CPU.
PIXELS_PER_BATCH = {"cuda": 4 * 512 * 512}
PIXELS_ON_OTHERS = 512 * 512
MOST_AT_ONCE = 64
MOST_SHARDS = 4096  # that a run makes; each stays mapped, and a system allows some ten thousands
VERSION = 1  # of decoding and scaling: another one makes other moments


class Kept:
    """The moments of a dataset's pictures, in its order: kept[i] is float32 [variants, 8, h, w],
    wherever the store holds them.

    keys has those of each picture's variants, new counts those that were not there before.
    """

    def __init__(self, store: Moments, keys: Iterable[list[str]], new: int):
        self._store, self.new = store, new
        # Numbers in arrays: with 100,000 pictures, objects for each of them would take more than
        # all the rest.
        self._starts, self._shards, self._firsts, self._shapes = (
            array("q", [0]),
            array("l"),
            array("q"),
            [],
        )
        for those in keys:
            for place in map(store.place, those):
                self._shards.append(place.shard)
                self._firsts.append(place.first)
                self._shapes.append(place.shape)
            self._starts.append(len(self._shards))
        store.forget_keys()
        self.files = store.files_of(set(self._shards))
        self.total = len(self._shards)  # variants

    def describe(self, folder: Path | None) -> list[str]:
        """What was encoded and where it is kept, as lines."""
        if folder is None or self._store.refused:
            why = f": {folder} cannot be written ({self._store.refused})" if folder else ""
            return [f"encoded    {self.total}, kept in memory{why}"]
        return [f"encoded    {self.new} now, {self.total - self.new} were in {folder}"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return torch.stack([self._variant(index, pick) for pick in range(self.count(index))])

    def _variant(self, index: int, pick: int) -> torch.Tensor:
        number = self._starts[index] + pick
        return self._store.read(
            Place(self._shards[number], self._firsts[number], self._shapes[number])
        )

    def count(self, index: int) -> int:
        """How many variants the picture has."""
        return self._starts[index + 1] - self._starts[index]

    def cells(self, index: int) -> tuple[int, int]:
        """Height and width of the picture in latents."""
        return self._shapes[self._starts[index]][1:]

    def of(
        self, numbers: Sequence[int], indices: Sequence[int], picks: Sequence[int]
    ) -> torch.Tensor:
        """Moments [B, 8, h, w] of a variant each; what number a visit has in the run makes no
        difference."""
        return torch.stack(
            [self._variant(index, pick) for index, pick in zip(indices, picks, strict=True)]
        )

    def look_ahead(self, visits: Sequence[tuple[int, int]]) -> None:
        """All is there already."""


class _Missing(Dataset):
    """Some of a dataset's pictures in some forms; a damaged one gives its reason instead of an
    exception."""

    def __init__(self, dataset: MegaManDataset, wanted: Sequence[tuple[int, list[Form]]]):
        self.dataset, self.wanted = dataset, wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> list[torch.Tensor] | str:
        try:
            return self.dataset.read(*self.wanted[place])
        except BadImageError as error:
            return str(error)


def _from_workers(loader: DataLoader) -> Iterator[list[torch.Tensor] | str]:
    """The loader's items; a worker that was killed, as for want of memory, ends in a line."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        remedy = "Take fewer of them, or none: --dataloader_num_workers 0"
        raise UserError(
            f"A worker that decodes pictures died ({summarize_error(error)})", remedy
        ) from None


class Encoder:
    """A VAE that takes pictures of one size in batches, smaller ones and in tiles where memory is
    short."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self._pixels = PIXELS_PER_BATCH.get(vae.device.type, PIXELS_ON_OTHERS)

    def at_once(self, size: Size) -> int:
        """Pictures of this size in pixels that go together."""
        return min(MOST_AT_ONCE, max(1, self._pixels // (size[0] * size[1])))

    @torch.no_grad()
    def moments(self, pictures: torch.Tensor) -> torch.Tensor:
        """Moments, float32 [B, 8, h, w] on the VAE's device, of pictures [B, 3, H, W]."""
        return retry_on_oom(partial(self._encode, pictures), self._make_room)

    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        parts = pictures.split(self.at_once(tuple(pictures.shape[2:])))
        parts = [part.to(self.vae.device, self.vae.dtype, non_blocking=True) for part in parts]
        return torch.cat([self.vae.encode(part).latent_dist.parameters.float() for part in parts])

    def _make_room(self) -> None:
        if self._pixels > 1:
            self._pixels = 1
        elif not self.vae.use_tiling:
            self.vae.enable_tiling()
        else:
            raise UserError(
                "The VAE needs more memory than there is",
                "Lower --resolution, or close other programs",
            )


def identify(base: Base, seen: Stamps) -> str:
    """The identity of the base's VAE: as noted for its files, or else computed, for which it is
    loaded."""
    files = [(path, stamp_of(path)) for path in base.vae_files()]
    told = {seen.told(path, stamp) for path, stamp in files}
    if len(told) == 1 and (known := told.pop()):
        return known
    identity = vae_identity(base.vae)
    seen.note((path, stamp, identity) for path, stamp in files)
    return identity


def encode_pictures(
    load_vae: Callable[[], AutoencoderKL],
    dataset: MegaManDataset,
    crops: int,
    flip: bool,
    seed: int,
    seen: Stamps,
    store: Moments,
    workers: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Kept:
    """Have the VAE's moments of every form of every picture in the store, computing those that it
    lacks.

    What cannot be decoded is dropped from the dataset with the reason. load_vae is asked where
    something is missing only. What is computed is stored batch by batch, so a stop loses one of
    them at most.

    The workers may be spawned: what they get is pickled. More than there are cores would only slow
    each other down.
    """
    dataset.recognise(seen)
    keys, wanted, asked = [], [], set()
    for index, look in enumerate(dataset.looks):
        forms = {_key(look.digest, form): form for form in dataset.forms(index, crops, flip, seed)}
        keys.append(list(forms))
        if new := {
            key: form for key, form in forms.items() if key not in store and key not in asked
        }:
            asked |= new.keys()
            wanted.append((index, new))
    problems = (
        _encode_missing(load_vae, dataset, wanted, store, workers, progress) if wanted else {}
    )
    # A copy of a damaged picture was not decoded, but lacks its moments too.
    bad = {
        index: problems.get(index)
        for index, those in enumerate(keys)
        if not all(key in store for key in those)
    }
    reason = next(iter(problems.values()), "")
    dataset.drop({dataset.pictures[index]: own or reason for index, own in bad.items()})
    keys = [those for index, those in enumerate(keys) if index not in bad]
    return Kept(store, keys, len(asked.intersection(key for those in keys for key in those)))


def _encode_missing(
    load_vae: Callable[[], AutoencoderKL],
    dataset: MegaManDataset,
    wanted: list[tuple[int, dict[str, Form]]],
    store: Moments,
    workers: int,
    progress: Callable[[Iterable], Iterable],
) -> dict[int, str]:
    """Encode these forms by key into the store, in batches of one size; returns why pictures could
    not be read."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    missing = _Missing(dataset, [(index, list(new.values())) for index, new in wanted])
    loader = DataLoader(missing, batch_size=None, num_workers=min(workers, cores))
    encoder, problems = Encoder(load_vae()), {}
    pending: dict[Size, dict[str, torch.Tensor]] = {}  # by size
    least = -(-sum(len(new) for _, new in wanted) // MOST_SHARDS)  # of a shard

    def flush(size: Size) -> None:
        batch = pending.pop(size)
        store.add(
            dict(zip(batch, encoder.moments(torch.stack(list(batch.values()))).cpu(), strict=True))
        )

    for (index, new), pictures in zip(wanted, progress(_from_workers(loader)), strict=True):
        if isinstance(pictures, str):
            problems[index] = pictures
            continue
        for (key, form), picture in zip(new.items(), pictures, strict=True):
            pending.setdefault(form.size, {})[key] = picture
            if len(pending[form.size]) >= max(least, encoder.at_once(form.size)):
                flush(form.size)
    for size in list(pending):
        flush(size)
    return problems


def _key(digest: bytes, form: Form) -> str:
    """What the moments of a picture hang on beside the VAE: its bytes and what is done to them."""
    text = f"{VERSION} {digest.hex()} {form.box} {form.size} {form.mirrored}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def drop_damaged(
    dataset: MegaManDataset, threads: int, progress: Callable[[Iterable], Iterable] = iter
) -> None:
    """Decode every picture once and drop those that cannot be: later one of them would stop the
    run."""

    def reason_against(index: int) -> str | None:
        try:
            dataset.read(index, dataset.forms(index, 1, False, 0))
        except BadImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, threads)) as pool:
        reasons = list(progress(pool.map(reason_against, range(len(dataset)))))
    dataset.drop(
        {path: reason for path, reason in zip(dataset.pictures, reasons, strict=True) if reason}
    )


class Fresh:
    """Moments of a dataset's pictures, made when they are asked for; the counterpart of
    latents.Kept.

    The crop hangs on the seed and the visit's number in the run. Pictures are decoded ahead by
    threads, since Pillow lets others work while it decodes; on a card they wait in pinned memory.

    Args:
        vae_scale_factor: pixels a side of one latent cell.
        threads: that decode.
    """

    def __init__(
        self,
        encoder: Encoder,
        dataset: MegaManDataset,
        flip: bool,
        seed: int,
        vae_scale_factor: int,
        threads: int,
    ):
        self._encoder, self._dataset, self._flip, self._seed = encoder, dataset, flip, seed
        self._factor, self._pin = vae_scale_factor, encoder.vae.device.type == "cuda"
        self._threads = ThreadPoolExecutor(max(1, threads), thread_name_prefix="decoding")
        self._coming: dict[int, Future[torch.Tensor]] = {}  # by number

    def __len__(self) -> int:
        return len(self._dataset)

    def count(self, index: int) -> int:
        """How many variants the picture has: itself, and its mirror image where that is wanted."""
        return 1 + (self._flip and not self._dataset.keeps_sides(index))

    def cells(self, index: int) -> tuple[int, int]:
        """Height and width of the picture in latents."""
        width, height = self._dataset.forms(index, 1, False, 0)[0].size
        return height // self._factor, width // self._factor

    def look_ahead(self, visits: Sequence[tuple[int, int]]) -> None:
        """Begin to decode the pictures of these visits, by number and index, and forget all
        others."""
        self._coming = {
            number: self._coming.get(number) or self._threads.submit(self._decode, number, index)
            for number, index in visits
        }

    def of(
        self, numbers: Sequence[int], indices: Sequence[int], picks: Sequence[int]
    ) -> torch.Tensor:
        """Moments [B, 8, h, w] of these visits on the VAE's device, mirrored where the pick is
        1."""
        missing = [
            visit for visit in zip(numbers, indices, strict=True) if visit[0] not in self._coming
        ]
        for number, index in missing:
            self._coming[number] = self._threads.submit(self._decode, number, index)
        pictures = []
        for number, index, pick in zip(numbers, indices, picks, strict=True):
            try:
                picture = self._coming[number].result()
            except BadImageError as error:
                path = self._dataset.pictures[index]
                remedy = "Put it back as it was and go on with --resume_from_checkpoint latest"
                raise UserError(f"{path}: {error}", remedy) from None
            pictures.append(picture.flip(-1) if pick else picture)
        return self._encoder.moments(torch.stack(pictures))

    def _decode(self, number: int, index: int) -> torch.Tensor:
        form = self._dataset.forms(index, 1, False, f"{self._seed} visit {number}")[0]
        picture = self._dataset.read(index, [form])[0]
        return picture.pin_memory() if self._pin else picture

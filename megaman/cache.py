"""What the frozen VAE and text encoder say about each picture and caption: computed once, before the loop."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from megaman.base import vae_identity
from megaman.errors import UserError, brief
from megaman.images import BadImageError
from megaman.memory import until_it_fits
from megaman.moments import Moments
from megaman.stamps import Stamps, stamp_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from megaman.base import Base
    from megaman.buckets import Size
    from megaman.dataset import Form, MegaManDataset

# In the VAE together: more do not make it faster, but take more memory. A card wants more to do than a CPU.
PIXELS_AT_ONCE = {"cuda": 4 * 512 * 512}
PIXELS_ON_OTHERS = 512 * 512
MOST_AT_ONCE = 64
MOST_SHARDS = 4096  # that a run makes; each stays mapped, and a system allows some ten thousands
MOST_STATES = 2**30  # bytes of text states in memory; SD 1.5's of 4,500 captions in float32
VERSION = 1  # of decoding and scaling: another one makes other moments


class Kept:
    """The moments of a dataset's pictures, in its order: kept[i] is float32 [variants, 8, h, w], whatever the store
    holds them in."""

    def __init__(self, store: Moments, keys: list[list[str]], new: int):
        self._store, self._keys = store, keys
        self.total, self.new = sum(map(len, keys)), new  # variants, and those that were not there before

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def files(self) -> set[Path]:
        """The shards that hold them."""
        return self._store.files()

    def describe(self, folder: Path | None) -> list[str]:
        """What was encoded and where it is kept, as lines."""
        if folder is None or self._store.refused:
            why = f": {folder} cannot be written ({self._store.refused})" if folder else ""
            return [f"encoded    {self.total}, kept in memory{why}"]
        return [f"encoded    {self.new} now, {self.total - self.new} were in {folder}"]

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack([self._store[key] for key in self._keys[index]])

    def count(self, index: int) -> int:
        """How many variants the picture has."""
        return len(self._keys[index])

    def cells(self, index: int) -> tuple[int, int]:
        """Height and width of the picture in latents."""
        return self._store.shape(self._keys[index][0])[1:]

    def of(self, numbers: Sequence[int], indices: Sequence[int], picks: Sequence[int]) -> torch.Tensor:
        """Moments [B, 8, h, w] of a variant each; what number a visit has in the run makes no difference."""
        chosen = (self._keys[index][pick] for index, pick in zip(indices, picks, strict=True))
        return torch.stack([self._store[key] for key in chosen])

    def look_ahead(self, visits: Sequence[tuple[int, int]]) -> None:
        """All is there already."""


class _Missing(Dataset):
    """Some of a dataset's pictures in some forms; a damaged one gives its reason instead of an exception."""

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
        raise UserError(f"A worker that decodes pictures died ({brief(error)})", remedy) from None


class Encoder:
    """A VAE that takes pictures of one size in batches, smaller ones and in tiles where memory is short."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self._pixels = PIXELS_AT_ONCE.get(vae.device.type, PIXELS_ON_OTHERS)

    def at_once(self, size: Size) -> int:
        """Pictures of this size in pixels that go together."""
        return min(MOST_AT_ONCE, max(1, self._pixels // (size[0] * size[1])))

    @torch.no_grad()
    def moments(self, pictures: torch.Tensor) -> torch.Tensor:
        """Moments, float32 [B, 8, h, w] on the VAE's device, of pictures [B, 3, H, W]."""
        return until_it_fits(partial(self._encode, pictures), self._make_room)

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
            raise UserError("The VAE needs more memory than there is", "Lower --resolution, or close other programs")


def identify(base: Base, seen: Stamps) -> str:
    """The identity of the base's VAE: as noted for its files, or else computed, for which it is loaded."""
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
    """Have the VAE's moments of every form of every picture in the store, computing those that it lacks.

    What cannot be decoded is dropped from the dataset with the reason. load_vae is asked where something is missing
    only. What is computed is stored batch by batch, so a stop loses one of them at most.

    The workers may be spawned: what they get is pickled. More than there are cores would only slow each other down.
    """
    dataset.recognise(seen)
    keys, wanted, asked = [], [], set()
    for index, look in enumerate(dataset.looks):
        forms = {_key(look.digest, form): form for form in dataset.forms(index, crops, flip, seed)}
        keys.append(list(forms))
        if new := {key: form for key, form in forms.items() if key not in store and key not in asked}:
            asked |= new.keys()
            wanted.append((index, new))
    problems = _encode_missing(load_vae, dataset, wanted, store, workers, progress) if wanted else {}
    # A copy of a damaged picture was not decoded, but lacks its moments too.
    bad = {index: problems.get(index) for index, those in enumerate(keys) if not all(key in store for key in those)}
    reason = next(iter(problems.values()), "")
    dataset.drop({dataset.pictures[index]: own or reason for index, own in bad.items()})
    keys = [those for index, those in enumerate(keys) if index not in bad]
    store.keep_only(key for those in keys for key in those)
    return Kept(store, keys, len(asked & {key for those in keys for key in those}))


def _encode_missing(
    load_vae: Callable[[], AutoencoderKL],
    dataset: MegaManDataset,
    wanted: list[tuple[int, dict[str, Form]]],
    store: Moments,
    workers: int,
    progress: Callable[[Iterable], Iterable],
) -> dict[int, str]:
    """Encode these forms by key into the store, in batches of one size; returns why pictures could not be read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    missing = _Missing(dataset, [(index, list(new.values())) for index, new in wanted])
    loader = DataLoader(missing, batch_size=None, num_workers=min(workers, cores))
    encoder, problems = Encoder(load_vae()), {}
    pending: dict[Size, dict[str, torch.Tensor]] = {}  # by size
    least = -(-sum(len(new) for _, new in wanted) // MOST_SHARDS)  # of a shard

    def flush(size: Size) -> None:
        batch = pending.pop(size)
        store.add(dict(zip(batch, encoder.moments(torch.stack(list(batch.values()))).cpu(), strict=True)))

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


def _key(digest: str, form: Form) -> str:
    """What the moments of a picture hang on beside the VAE: its bytes and what is done to them."""
    text = f"{VERSION} {digest} {form.box} {form.size} {form.mirrored}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids [B, positions]; longer captions are cut at the last position."""
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode_captions(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Text states [positions, width] on the CPU for each distinct caption; longer ones are cut at the last position."""
    states = {}
    distinct = list(dict.fromkeys(captions))
    for start in range(0, len(distinct), 32):
        part = distinct[start : start + 32]
        hidden = text_encoder(token_ids(tokenizer, part).to(text_encoder.device))[0].cpu()
        states.update(zip(part, hidden, strict=True))
    return states


class Texts:
    """The text states of a run's captions: kept in memory for each distinct one, and the text encoder let go; or read
    at each step, where it is in training, where captions vary, or where the states would take too much memory.

    states holds those of the captions that stay as they are, fixed among them; None with trained. Where accelerate
    prepared the encoder for training, it has to be set as reader.
    """

    def __init__(
        self,
        base: Base,
        captions: Sequence[str],
        fixed: Sequence[str],
        varied: bool,
        trained: bool,
        device: torch.device,
    ):
        self._tokenizer, self._device = base.tokenizer, device
        self.reader: torch.nn.Module = base.text_encoder
        self.reads_on = varied or trained or too_many(base.text_encoder, captions)
        known = fixed if self.reads_on else [*captions, *fixed]
        self.states = None if trained else encode_captions(base.text_encoder, base.tokenizer, known)
        if not self.reads_on:
            del self.reader
            base.release("text_encoder")

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """States [B, positions, width]."""
        if self.reads_on:
            return self.reader(token_ids(self._tokenizer, captions).to(self._device))[0]
        return torch.stack([self.states[caption] for caption in captions])


def too_many(text_encoder: CLIPTextModel, captions: Iterable[str]) -> bool:
    """Whether the states of all distinct captions would take more memory than reading them at each step is worth."""
    config = text_encoder.config
    numbers = len(set(captions)) * config.max_position_embeddings * config.hidden_size
    return numbers * text_encoder.dtype.itemsize > MOST_STATES


def cut_off(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[str]:
    """For each caption what falls away because the text encoder has no position for it, "" where nothing does."""
    room = tokenizer.model_max_length - 2  # without the marks at either end
    if not captions:
        return []
    read = tokenizer(list(captions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        caption[spans[room][0] :].strip(" ,") if len(spans) > room else ""
        for caption, spans in zip(captions, read["offset_mapping"], strict=True)
    ]

"""What the frozen VAE and text encoder say about each picture and caption: computed once, before the loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from megaman.errors import UserError, brief
from megaman.images import BadImageError
from megaman.memory import until_it_fits

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from megaman.dataset import MegaManDataset

PIXELS_AT_ONCE = 4 * 512 * 512  # in the VAE together: more do not make it faster, but take more memory


class _Variants(Dataset):
    """The dataset's pictures as lists of variants; a damaged one gives its reason instead of an exception."""

    def __init__(self, dataset: MegaManDataset, crops: int, flip: bool, seed: int):
        self.dataset, self.crops, self.flip, self.seed = dataset, crops, flip, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return torch.stack(self.dataset.variants(index, self.crops, self.flip, self.seed))
        except BadImageError as error:
            return str(error)


def _from_workers(loader: DataLoader) -> Iterator[torch.Tensor | str]:
    """The loader's items; a worker that was killed, as for want of memory, ends in a line."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        remedy = "Take fewer of them, or none: --dataloader_num_workers 0"
        raise UserError(f"A worker that decodes pictures died ({brief(error)})", remedy) from None


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL,
    dataset: MegaManDataset,
    crops: int,
    flip: bool,
    seed: int,
    workers: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[list[torch.Tensor], dict[Path, str]]:
    """VAE moments of every variant of every picture, and the pictures that could not be read with the reasons.

    The first is a list with one float32 tensor [variants, 8, H/8, W/8] on the CPU for each good picture; the damaged
    ones are dropped from the dataset, so that both stay in step. (H/8 stands for the VAE's own factor.)

    The workers may be spawned: what they get is pickled. More than there are cores would only slow each other down.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, cores)
    loader = DataLoader(_Variants(dataset, crops, flip, seed), batch_size=None, num_workers=workers)
    at_once = max(1, min(4, PIXELS_AT_ONCE // dataset.size**2))
    moments, problems = [], {}

    def encode(variants: torch.Tensor) -> torch.Tensor:
        parts = [part.to(vae.device, vae.dtype) for part in variants.split(at_once)]
        return torch.cat([vae.encode(part).latent_dist.parameters.float().cpu() for part in parts])

    def make_room() -> None:
        nonlocal at_once
        if at_once > 1:
            at_once = 1
        elif not vae.use_tiling:
            vae.enable_tiling()
        else:
            raise UserError("The VAE needs more memory than there is", "Lower --resolution, or close other programs")

    for picture, variants in zip(list(dataset.pictures), progress(_from_workers(loader)), strict=True):
        if isinstance(variants, str):
            problems[picture] = variants
            continue
        moments.append(until_it_fits(partial(encode, variants), make_room))
    dataset.drop(problems)
    return moments, problems


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

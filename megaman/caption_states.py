"""What the frozen text encoder says about each caption: computed once, or at every step where that has to be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from megaman.base import Base

MOST_STATES = 2**30  # bytes of text states in memory; SD 1.5's of 4,500 captions in float32


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


class CaptionStates:
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
    ends, distinct = {}, list(dict.fromkeys(captions))
    for start in range(0, len(distinct), 1000):  # of all at once the tokens would take kilobytes each
        part = distinct[start : start + 1000]
        read = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for caption, spans in zip(part, read["offset_mapping"], strict=True):
            ends[caption] = caption[spans[room][0] :].strip(" ,") if len(spans) > room else ""
    return [ends[caption] for caption in captions]

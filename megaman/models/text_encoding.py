"""Prompts and captions to prompt_embeds, the hidden states of the text encoder that the UNet
attends to.

Prompts may have any length and A1111's weights, and are read at a layer of choice. Captions are
encoded once if possible, or else at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from megaman import cuda
from megaman.errors import UserError
from megaman.models.prompt_weights import parse
from megaman.processes import Processes

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from megaman.models.base import Base

# Tokens at the end of a chunk among which a comma ends it, as in A1111, so that no phrase is split.
COMMA_WINDOW = 20
MIN_MEAN_FACTOR = 0.1  # a mean that drops further is rounding noise, and dividing by it blows up
MAX_CACHE_BYTES = 2**30  # of prompt_embeds: Stable Diffusion 1.5's of 4,500 captions in float32
ENCODER_BATCH = 32  # captions
TOKENIZER_BATCH = 1000  # captions; the tokens of all of them at once would take kilobytes each


class _Chunk(NamedTuple):
    """Tokens that the text encoder reads at once, without BOS and EOS, and the weight of each."""

    input_ids: list[int]
    weights: list[float]


@torch.no_grad()
def encode_prompt(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, prompt: str, clip_skip: int = 1
) -> torch.Tensor:
    """prompt_embeds [chunks * positions, width] of one prompt, on the CPU in the encoder's dtype.

    The tokens are split into chunks that fit between BOS and EOS (75 in CLIP); each is encoded on
    its own, and the results are concatenated. clip_skip counts as in A1111 and kohya's scripts: 1
    takes the last layer, 2 the one before (diffusers' clip_skip of 1), each with the final layer
    norm. A prompt of one chunk without weights has the embeds of `encode_captions`, bit for bit.

    Raises UserError if the text encoder has fewer than clip_skip layers.
    """
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise UserError(
            f"--clip_skip {clip_skip} fits no layer of this base's text encoder",
            f"Take 1 to {layers}",
        )
    chunks = _chunks(tokenizer, prompt)
    return torch.cat([_encode(text_encoder, tokenizer, chunk, clip_skip) for chunk in chunks])


def count_chunks(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """The number of chunks in a prompt's embeds: 1 for up to 75 tokens of CLIP."""
    return len(_chunks(tokenizer, prompt))


def pad_chunks(prompt_embeds: torch.Tensor, empty: torch.Tensor, chunks: int) -> torch.Tensor:
    """prompt_embeds padded to [chunks * positions, width] with those of the empty prompt.

    As in A1111: the prompts of a batch, and a prompt and its negative one, need the same length.
    empty is encode_prompt's result for "", [positions, width].
    """
    missing = chunks - len(prompt_embeds) // len(empty)
    return torch.cat([prompt_embeds, *[empty] * missing])


def _chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[_Chunk]:
    """The prompt's tokens and their weights in chunks; the empty prompt is one empty chunk."""
    input_ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse(prompt):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        input_ids += ids
        weights += [weight] * len(ids)
    comma = tokenizer(",", add_special_tokens=False).input_ids
    chunks, start = [], 0
    while start == 0 or start < len(input_ids):
        end = _chunk_end(input_ids, start, tokenizer.model_max_length - 2, comma)
        chunks.append(_Chunk(input_ids[start:end], weights[start:end]))
        start = end
    return chunks


def _chunk_end(input_ids: list[int], start: int, length: int, comma: list[int]) -> int:
    """The end of the chunk that begins at start: after at most length tokens, or at the last comma
    of the window if the prompt is longer."""
    end = start + length
    if end >= len(input_ids) or [input_ids[end]] == comma:
        return end
    window = range(max(start, end - COMMA_WINDOW), end)
    commas = [position for position in window if [input_ids[position]] == comma]
    return commas[-1] + 1 if commas else end


def _encode(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, chunk: _Chunk, clip_skip: int
) -> torch.Tensor:
    """prompt_embeds [positions, width] of one chunk."""
    padding = tokenizer.model_max_length - 2 - len(chunk.input_ids)
    pad_ids = [tokenizer.pad_token_id] * padding
    ids = [tokenizer.bos_token_id, *chunk.input_ids, tokenizer.eos_token_id, *pad_ids]
    input_ids = torch.tensor([ids], device=text_encoder.device)
    if clip_skip == 1:
        embeds = text_encoder(input_ids)[0][0].cpu()
    else:
        hidden = text_encoder(input_ids, output_hidden_states=True).hidden_states[-clip_skip]
        embeds = text_encoder.final_layer_norm(hidden)[0].cpu()
    if all(weight == 1 for weight in chunk.weights):
        return embeds
    return weigh(embeds, torch.tensor([1.0, *chunk.weights, *[1.0] * (padding + 1)]))


def weigh(prompt_embeds: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """prompt_embeds [positions, width] times weights [positions], with the mean restored (A1111).

    If the means of all positions have the same sign, as in CLIP, the mean changes by a factor
    between the smallest and the largest weight. A factor outside of that range means that the
    positions cancel out, as in a text encoder whose embeds are centered on 0: then the mean
    measures nothing, dividing by it could even flip the sign, and the product stays as it is.
    """
    weighted = prompt_embeds.float() * weights[:, None]
    factor = (weighted.mean() / prompt_embeds.float().mean()).item()
    if max(MIN_MEAN_FACTOR, weights.min().item()) <= factor <= weights.max().item():
        weighted = weighted / factor
    return weighted.to(prompt_embeds.dtype)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """input_ids [B, positions] of captions, truncated if they are longer."""
    return tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_captions(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    captions: Sequence[str],
    processes: Processes | None = None,
) -> dict[str, torch.Tensor]:
    """prompt_embeds [positions, width] of each distinct caption, truncated and on the CPU.

    Several processes, all of which have to call this, share the batches out and exchange what they
    have encoded.
    """
    processes = processes or Processes()
    prompt_embeds = {}
    distinct = list(dict.fromkeys(captions))
    batches = [
        distinct[start : start + ENCODER_BATCH] for start in range(0, len(distinct), ENCODER_BATCH)
    ]
    for first in range(0, len(batches), processes.count):
        together = batches[first : first + processes.count]
        embeds = None
        for batch in processes.share(together):
            input_ids = tokenize(tokenizer, batch).to(text_encoder.device)
            embeds = text_encoder(input_ids)[0].cpu()
        exchanged = processes.exchange(embeds)[: len(together)]
        for batch, others in zip(together, exchanged, strict=True):
            assert others is not None
            prompt_embeds.update(zip(batch, others, strict=True))
    return prompt_embeds


@dataclass(frozen=True)
class RunTexts:
    """What a run encodes: the captions it trains on, the texts that are the same at every step (the
    empty one), the evaluated captions, and the prompts of sample images."""

    captions: Sequence[str]
    fixed: Sequence[str] = ("",)
    evaluated: Sequence[str] = ()
    prompts: Sequence[str] = ()


class CaptionEmbeddings:
    """The prompt_embeds of a run's captions, cached on the CPU or computed at every step.

    They are cached, and the text encoder is released, unless it is trained, the captions vary, or
    the cache would be too large. prompt_embeds then holds those of the fixed and the evaluated
    texts alone; it is None if the text encoder is trained. The evaluated texts are encoded in
    batches of their own, or the bits of the others could depend on them.

    sample_embeds are those of the prompts of sample images, of any length and with weights
    (`encode_prompt`); None if the text encoder is trained. Several processes share out the others.
    """

    def __init__(
        self,
        base: Base,
        texts: RunTexts,
        is_varied: bool,
        is_trained: bool,
        processes: Processes | None = None,
    ):
        self._tokenizer, self._device = base.tokenizer, base.device
        self._text_encoder: nn.Module | None = base.text_encoder
        is_too_large = exceeds_cache(base.text_encoder, texts.captions)
        is_cached = not (is_varied or is_trained or is_too_large)
        cached = [*texts.captions, *texts.fixed] if is_cached else texts.fixed
        self.prompt_embeds: dict[str, torch.Tensor] | None = None
        if not is_trained:
            encode = partial(
                encode_captions, base.text_encoder, base.tokenizer, processes=processes
            )
            self.prompt_embeds = {**encode(texts.evaluated), **encode(cached)}
        self.sample_embeds: dict[str, torch.Tensor] | None = None
        if not is_trained:
            self.sample_embeds = {
                prompt: encode_prompt(base.text_encoder, base.tokenizer, prompt)
                for prompt in texts.prompts
            }
        if is_cached:
            self._text_encoder = None
            base.release("text_encoder")

    def __call__(
        self, captions: Sequence[str], text_encoder: nn.Module | None = None
    ) -> torch.Tensor:
        """prompt_embeds [B, positions, width] of captions.

        text_encoder takes the place of the base's own: in training it is the one that accelerate
        has prepared.
        """
        encoder = self._text_encoder if text_encoder is None else text_encoder
        if encoder is None:
            assert self.prompt_embeds is not None
            return torch.stack([self.prompt_embeds[caption] for caption in captions])
        return encoder(cuda.upload(tokenize(self._tokenizer, captions), self._device))[0]


def exceeds_cache(text_encoder: CLIPTextModel, captions: Iterable[str]) -> bool:
    """Whether the embeds of all distinct captions would take more than MAX_CACHE_BYTES."""
    config = text_encoder.config
    numbers = len(set(captions)) * config.max_position_embeddings * config.hidden_size
    return numbers * text_encoder.dtype.itemsize > MAX_CACHE_BYTES


def truncated_text(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[str]:
    """The end of each caption that the text encoder has no positions for, "" if all of it fits."""
    length = tokenizer.model_max_length - 2  # without BOS and EOS
    truncated, distinct = {}, list(dict.fromkeys(captions))
    for start in range(0, len(distinct), TOKENIZER_BATCH):
        batch = distinct[start : start + TOKENIZER_BATCH]
        tokens = tokenizer(
            batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for caption, offsets in zip(batch, tokens["offset_mapping"], strict=True):
            is_longer = len(offsets) > length
            truncated[caption] = caption[offsets[length][0] :].strip(" ,") if is_longer else ""
    return [truncated[caption] for caption in captions]

"""Texts as the text encoder's states: prompts of any length, with A1111's weights, from a layer of
choice; captions, computed once or, if that has to be, at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from megaman.errors import UserError
from megaman.models.prompt_weights import parse

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

    from megaman.models.base import Base

# tokens: a chunk ends at a comma among its last ones, as in A1111, so that no phrase is torn apart
LOOK_BACK = 20
FAINTEST = (
    0.1  # a mean that sinks further is rounding, and to bring it back would blow everything up
)

MOST_STATES = 2**30  # bytes of text states in memory; SD 1.5's of 4,500 captions in float32


class _Chunk(NamedTuple):
    """A part of a prompt that the text encoder reads at once: token ids and a weight for each,
    without BOS and EOS."""

    ids: list[int]
    weights: list[float]


@torch.no_grad()
def encode_prompt(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, prompt: str, clip_skip: int = 1
) -> torch.Tensor:
    """Text states [positions · chunks, width] of one prompt, on the CPU and in the text encoder's
    precision.

    The tokens are cut into chunks of as many as fit between BOS and EOS (75 in CLIP). Each chunk is
    encoded on its own, so that nothing else changes its states, and the states stand one behind the
    other. clip_skip counts as in A1111 and kohya's scripts: 1 takes the last layer, 2 the one
    before (which diffusers calls 1), each through the final layer norm. A prompt of one chunk
    without weights has the states that text_encoding.encode_captions gives for it alone.

    Raises UserError where clip_skip is more than the text encoder has layers.
    """
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise UserError(
            f"--clip_skip {clip_skip} fits no layer of this base's text encoder",
            f"Take 1 to {layers}",
        )
    return torch.cat(
        [_encode(text_encoder, tokenizer, chunk, clip_skip) for chunk in _chunks(tokenizer, prompt)]
    )


def count_chunks(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """How many times the text encoder's positions a prompt takes: 1 for up to 75 tokens of CLIP."""
    return len(_chunks(tokenizer, prompt))


def pad_chunks(states: torch.Tensor, empty: torch.Tensor, chunks: int) -> torch.Tensor:
    """A prompt's states brought to a number of chunks [positions · chunks, width] with those of the
    empty prompt.

    As in A1111: prompts that are drawn together, and a prompt and its negative one, need the same
    number. empty is encode_prompt's answer to "", [positions, width].
    """
    return torch.cat([states, *[empty] * (chunks - len(states) // len(empty))])


def _chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[_Chunk]:
    """The prompt's tokens with their weights in pieces that fit; the empty prompt is one empty
    chunk."""
    ids, weights = [], []
    for text, weight in parse(prompt):
        part = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids += part
        weights += [weight] * len(part)
    comma = tokenizer(",", add_special_tokens=False).input_ids
    room = tokenizer.model_max_length - 2
    chunks, start = [], 0
    while start == 0 or start < len(ids):
        end = start + room
        if end < len(ids) and [ids[end]] != comma:
            commas = [
                place for place in range(max(start, end - LOOK_BACK), end) if [ids[place]] == comma
            ]
            end = commas[-1] + 1 if commas else end
        chunks.append(_Chunk(ids[start:end], weights[start:end]))
        start = end
    return chunks


def _encode(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, chunk: _Chunk, clip_skip: int
) -> torch.Tensor:
    """States [positions, width] of one chunk."""
    padding = tokenizer.model_max_length - 2 - len(chunk.ids)
    ids = [
        tokenizer.bos_token_id,
        *chunk.ids,
        tokenizer.eos_token_id,
        *[tokenizer.pad_token_id] * padding,
    ]
    input_ids = torch.tensor([ids], device=text_encoder.device)
    if clip_skip == 1:
        states = text_encoder(input_ids)[0][0].cpu()
    else:
        hidden = text_encoder(input_ids, output_hidden_states=True).hidden_states[-clip_skip]
        states = text_encoder.final_layer_norm(hidden)[0].cpu()
    if all(weight == 1 for weight in chunk.weights):
        return states
    return weigh(states, torch.tensor([1.0, *chunk.weights, *[1.0] * (padding + 1)]))


def weigh(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """States [positions, width] times their weights [positions], brought back to the mean that they
    had (A1111).

    Where the means of the positions have one sign, as in CLIP, the mean changes by a factor between
    the smallest and the largest weight. Outside of that they cancel out, as in a text encoder whose
    states lie around 0: their mean is no measure of size, to divide by it could even turn the sign,
    and the states stay as they were multiplied.
    """
    weighted = states.float() * weights[:, None]
    factor = (weighted.mean() / states.float().mean()).item()
    if max(FAINTEST, weights.min().item()) <= factor <= weights.max().item():
        weighted = weighted / factor
    return weighted.to(states.dtype)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids [B, positions]; longer captions are cut at the last position."""
    return tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_captions(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Text states [positions, width] on the CPU for each distinct caption; longer ones are cut at
    the last position."""
    states = {}
    distinct = list(dict.fromkeys(captions))
    for start in range(0, len(distinct), 32):
        part = distinct[start : start + 32]
        hidden = text_encoder(tokenize(tokenizer, part).to(text_encoder.device))[0].cpu()
        states.update(zip(part, hidden, strict=True))
    return states


class CaptionEmbeddings:
    """The text states of a run's captions: kept in memory for each distinct one, and the text
    encoder let go; or read at each step, where it is in training, where captions vary, or where the
    states would take too much memory.

    states holds those of the captions that stay as they are, fixed among them; None with trained.
    Where accelerate prepared the encoder for training, it has to be set as reader.
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
            return self.reader(tokenize(self._tokenizer, captions).to(self._device))[0]
        return torch.stack([self.states[caption] for caption in captions])


def too_many(text_encoder: CLIPTextModel, captions: Iterable[str]) -> bool:
    """Whether the states of all distinct captions would take more memory than reading them at each
    step is worth."""
    config = text_encoder.config
    numbers = len(set(captions)) * config.max_position_embeddings * config.hidden_size
    return numbers * text_encoder.dtype.itemsize > MOST_STATES


def truncated_text(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[str]:
    """For each caption what falls away because the text encoder has no position for it, "" where
    nothing does."""
    room = tokenizer.model_max_length - 2  # without the marks at either end
    ends, distinct = {}, list(dict.fromkeys(captions))
    for start in range(
        0, len(distinct), 1000
    ):  # of all at once the tokens would take kilobytes each
        part = distinct[start : start + 1000]
        read = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for caption, spans in zip(part, read["offset_mapping"], strict=True):
            ends[caption] = caption[spans[room][0] :].strip(" ,") if len(spans) > room else ""
    return [ends[caption] for caption in captions]

"""prompt_embeds of prompts: long ones, weights, layers; compared with diffusers and captions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megaman.config.generate import DEFAULT_NEGATIVE_PROMPT
from megaman.errors import UserError
from megaman.models.base import load_base
from megaman.models.prompt_weights import parse
from megaman.models.text_encoding import (
    count_chunks,
    encode_captions,
    encode_prompt,
    pad_chunks,
    weigh,
)
from megaman.models.typed import move

Encoder = tuple[CLIPTextModel, CLIPTokenizer]
PROMPT = "mega man, blue robot, helmet, arm cannon"
LONG = "robot " * 75 + "red"  # one word more than a chunk holds


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder), torch.float32)


@pytest.fixture(scope="module")
def small(base_folder):
    """Another text encoder: 16 positions, five layers, another token for padding than for the
    end."""
    tokenizer = CLIPTokenizer.from_pretrained(
        base_folder / "tokenizer", model_max_length=16, pad_token="!"
    )
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text_encoder = CLIPTextModel(config).eval()
    torch.nn.init.normal_(
        text_encoder.final_layer_norm.bias, mean=-0.3, std=0.1
    )  # no mean of 0, as in CLIP
    return text_encoder, tokenizer


@pytest.fixture(params=["demo", "small"])
def encoder(request, base):
    """Text encoder and tokenizer; each test runs with both."""
    return (
        (base.text_encoder, base.tokenizer)
        if request.param == "demo"
        else request.getfixturevalue("small")
    )


def alone(encoder: Encoder, ids: list[int], layer: int = -1) -> torch.Tensor:
    """What the text encoder says of token ids between BOS and EOS, written a second way."""
    text_encoder, tokenizer = encoder
    input_ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    input_ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(input_ids))
    with torch.no_grad():
        out = text_encoder(torch.tensor([input_ids]), output_hidden_states=True)
        return text_encoder.final_layer_norm(out.hidden_states[layer])[0]


@pytest.mark.parametrize(
    "prompt", ["", "a robot", PROMPT, DEFAULT_NEGATIVE_PROMPT, "洛克人 🤖, <lora x>", "robot " * 75]
)
def test_a_short_plain_prompt_is_encoded_as_a_caption_bit_for_bit(base, prompt):
    own = encode_prompt(base.text_encoder, base.tokenizer, prompt)
    assert torch.equal(own, encode_captions(base.text_encoder, base.tokenizer, [prompt])[prompt])
    assert not own.requires_grad


def test_as_a_caption_with_another_padding_too(small: Encoder):
    for prompt in ["", "a robot", "robot " * 14]:
        assert torch.equal(encode_prompt(*small, prompt), encode_captions(*small, [prompt])[prompt])


@pytest.fixture(scope="module")
def pipe(base_folder):
    pipe = StableDiffusionPipeline.from_pretrained(
        base_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    # diffusers 0.42 looks for the norm where transformers had it before version 5
    pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    return pipe


def test_the_layers_are_those_of_diffusers(pipe, base):
    for ours, theirs in [(1, None), (1, 0), (2, 1)]:
        states = encode_prompt(base.text_encoder, base.tokenizer, PROMPT, clip_skip=ours)
        assert torch.equal(
            states, pipe.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=theirs)[0][0]
        )


def test_every_layer_and_none_beyond(encoder: Encoder):
    layers = encoder[0].config.num_hidden_layers
    ids = encoder[1]("a robot", add_special_tokens=False).input_ids
    for clip_skip in range(1, layers + 1):
        assert torch.equal(
            encode_prompt(*encoder, "a robot", clip_skip), alone(encoder, ids, -clip_skip)
        )
    for clip_skip in (0, -1, layers + 1):
        with pytest.raises(
            UserError, match=rf"--clip_skip {clip_skip} fits no layer.*Take 1 to {layers}"
        ):
            encode_prompt(*encoder, "a robot", clip_skip)


def test_a_long_prompt_is_its_chunks_one_behind_the_other(encoder: Encoder, caplog):
    tokenizer = encoder[1]
    room = tokenizer.model_max_length - 2
    prompt = "robot " * room + "red helmet " * room + "blue"
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    assert len(ids) == 3 * room + 1, "each of these words is one token"
    caplog.clear()
    states = encode_prompt(*encoder, prompt)
    assert count_chunks(tokenizer, prompt) == 4 and not caplog.records
    wanted = [alone(encoder, ids[start : start + room]) for start in range(0, len(ids), room)]
    assert torch.equal(states, torch.cat(wanted))


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_a_word_behind_the_last_position_counts(base, clip_skip):
    red, blue, none = (
        encode_prompt(base.text_encoder, base.tokenizer, prompt, clip_skip)
        for prompt in (LONG, LONG.replace("red", "blue"), "robot " * 75)
    )
    assert red.shape == blue.shape == (154, none.shape[1]) and none.shape[0] == 77
    assert torch.equal(red[:77], none) and torch.equal(blue[:77], none)
    assert not torch.allclose(red[77:], blue[77:], atol=1e-2)


def test_a_chunk_ends_at_a_comma_that_is_near(base):
    tokenizer, encoder = base.tokenizer, (base.text_encoder, base.tokenizer)

    def first_chunk(prompt: str) -> int:
        """The number of tokens in the first of two chunks, found by its embeds."""
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        states = encode_prompt(*encoder, prompt)
        return next(n for n in range(1, 76) if torch.equal(states[:77], alone(encoder, ids[:n])))

    assert first_chunk("robot " * 60 + ", " + "red " * 20) == 61
    assert first_chunk("robot " * 55 + ", " + "red " * 30) == 56, "the 20th token from the end"
    assert first_chunk("robot " * 54 + ", " + "red " * 30) == 75, "a comma too far away"
    assert first_chunk("robot " * 56 + ", " + "red " * 4 + ", " + "blue " * 30) == 62, (
        "the last of two"
    )
    assert first_chunk("robot " * 60 + ", " + "red " * 14 + ", blue") == 75, (
        "the phrase ends with the chunk"
    )
    assert first_chunk("robot " * 74 + ", red") == 75


def test_weights_multiply_and_keep_the_mean():
    """A1111's rule on states whose mean is a measure of size, as CLIP's is."""
    states = torch.randn(77, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    weights = torch.ones(77)
    weights[3:6] = torch.tensor([1.3, 0.5, 2.0])
    weighed = weigh(states, weights)
    assert weighed.mean().item() == pytest.approx(states.mean().item(), rel=1e-5)
    factors = (weighed / states).mean(1)
    assert torch.allclose(weighed, states * factors[:, None], atol=1e-5)
    assert torch.allclose(factors / factors[0], weights, atol=1e-4)
    assert weigh(states.half(), weights).dtype == torch.float16


def test_a_mean_that_says_nothing_is_left_alone():
    """States around 0: to bring back their mean would double them, or turn their sign."""
    weights = torch.ones(4)
    weights[1] = 1.5
    for drift in (1.0, 0.5, 0.25, 0.2):  # what the second position adds to a sum that is nearly 0
        states = torch.tensor([[1.0, 2.0], [drift, 0.0], [-1.0, -1.9], [0.0, -0.4]])
        assert torch.equal(weigh(states, weights), states * weights[:, None])
    flat = torch.tensor([[1.0, -1.0]] * 4)
    assert torch.equal(weigh(flat, weights), flat * weights[:, None]), "a mean of exactly 0"
    assert torch.isfinite(weigh(flat + 0.01, torch.tensor([1.0, -1.0, -1.0, 1.001]))).all()


def test_a_weighted_word_moves_its_own_states_and_the_more_the_heavier(encoder: Encoder):
    plain = encode_prompt(*encoder, "a red robot")
    moved = [
        (encode_prompt(*encoder, f"a (red:{weight}) robot") - plain).norm(dim=1)
        for weight in (1.1, 1.3, 1.6, 2.0)
    ]
    for moves in moved:
        assert moves.argmax() == 2, "BOS, a, red"
    assert all(less[2] < more[2] for less, more in pairwise(moved))
    assert torch.equal(
        encode_prompt(*encoder, "a (red) robot"), encode_prompt(*encoder, "a (red:1.1) robot")
    )
    assert torch.equal(encode_prompt(*encoder, "a (red:1.0) robot"), plain)
    assert torch.equal(
        encode_prompt(*encoder, r"robot \(red\)"), encode_prompt(*encoder, "robot (:1)\\(red\\)")
    )


def test_weights_reach_behind_the_first_chunk_and_stay_out_of_the_others(base):
    encoder = (base.text_encoder, base.tokenizer)
    plain, heavy = (
        encode_prompt(*encoder, LONG),
        encode_prompt(*encoder, LONG.replace("red", "(red:1.5)")),
    )
    assert torch.equal(plain[:77], heavy[:77])
    assert not torch.allclose(plain[78], heavy[78], atol=1e-2)


def test_fewer_chunks_are_filled_up_with_the_empty_prompt(encoder: Encoder):
    empty, states = encode_prompt(*encoder, ""), encode_prompt(*encoder, "a robot")
    positions = encoder[1].model_max_length
    padded = pad_chunks(states, empty, 3)
    assert padded.shape == (3 * positions, states.shape[1])
    assert torch.equal(padded, torch.cat([states, empty, empty]))
    assert torch.equal(pad_chunks(states, empty, 1), states)
    assert torch.equal(pad_chunks(padded, empty, 3), padded)


def test_tags_for_other_programs_are_not_drawn(base):
    states = [
        encode_prompt(base.text_encoder, base.tokenizer, prompt)
        for prompt in ("a robot <lora:megaman:0.8>, blue", "a robot , blue")
    ]
    assert torch.equal(*states)


def test_half_precision_stays_half(base_folder):
    base = load_base(str(base_folder), torch.bfloat16)
    text_encoder = move(base.text_encoder, torch.bfloat16)
    for prompt in ("a robot", "a (red:1.3) robot"):
        states = encode_prompt(text_encoder, base.tokenizer, prompt, clip_skip=2)
        assert states.dtype == torch.bfloat16 and torch.isfinite(states).all()


PIECES = [
    "robot",
    " ",
    ",",
    "(",
    ")",
    "[",
    "]",
    ":1.4)",
    ":-1)",
    "\\",
    "洛克人",
    "🤖",
    "<|endoftext|>",
    "\n",
    "q" * 40,
]


@hypothesis_settings(max_examples=60)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_prompt_is_finite_states_of_whole_chunks(small: Encoder, prompt):
    text_encoder, tokenizer = small
    states = encode_prompt(text_encoder, tokenizer, prompt)
    chunks = count_chunks(tokenizer, prompt)
    assert states.shape == (16 * chunks, 32) and torch.isfinite(states).all()
    tokens = sum(
        len(tokenizer(text, add_special_tokens=False).input_ids) for text, _ in parse(prompt)
    )
    assert max(1, -(-tokens // 14)) <= chunks <= max(1, tokens)

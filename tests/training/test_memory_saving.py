"""Out-of-memory errors raised on purpose: the run continues with the same effective batch size and
the same losses."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FEW_TARGETS, ROOT, learned_alike
from diffusers import AutoencoderKL, UNet2DConditionModel
from failing import fail_on
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.data.vae_encoder import VaeEncoder
from megaman.errors import UserError, out_of_memory
from megaman.models.base import load_base
from megaman.training import compute

# With a large epsilon AdamW steps in proportion to the gradients, so rounding errors stay small.
FIXED = [
    "--data_dir",
    ROOT / "demo" / "held_out",
    "--learning_rate",
    1e-3,
    "--adam_epsilon",
    1e-2,
    *FEW_TARGETS,
]
FIXED += ["--max_train_steps", 4]


def losses(folder):
    (run,) = folder.iterdir()
    return [event.value for event in EventAccumulator(str(run)).Reload().Scalars("train/loss")]


def moments(cache_dir):
    """The latents in a cache: float32 tensors by their key."""
    shards = [load_file(path) for path in cache_dir.rglob("*.safetensors")]
    return {key: tensor for shard in shards for key, tensor in shard.items()}


@pytest.fixture(scope="module")
def whole(train_here, tmp_path_factory):
    """A run of four images a step with enough memory: its folder and its LoRA."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_here(folder, "whole", *FIXED, "--train_batch_size", 4)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ({1}, ["gradient checkpointing is on"]),
        ({3}, ["gradient checkpointing is on"]),
        ({1, 2}, ["gradient checkpointing is on", "2 micro-batches of 2"]),
        (
            {2, 3, 5},
            ["gradient checkpointing is on", "2 micro-batches of 2", "4 micro-batches of 1"],
        ),
    ],
)
def test_training_continues_with_the_same_mathematics(
    train_here, whole, tmp_path, monkeypatch, capsys, calls, said
):
    folder, learned = whole
    fail_on(monkeypatch, UNet2DConditionModel, "forward", calls)
    short = train_here(tmp_path, "short", *FIXED, "--train_batch_size", 4)
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("too little memory:")] == [
        line for line in printed.splitlines() if any(words in line for words in said)
    ]
    assert all(words in printed for words in said)
    assert losses(tmp_path / "logs-short") == pytest.approx(losses(folder / "logs-whole"), rel=1e-4)
    assert learned_alike(learned, short)


def test_a_resumed_run_begins_with_the_reduced_memory(train_here, tmp_path, monkeypatch, capsys):
    """The same command resumes; it neither runs out of memory again nor requests what does not
    fit."""
    flags = [*FIXED, "--train_batch_size", 4, "--save_steps", 2]
    with monkeypatch.context() as patch:
        fail_on(patch, UNet2DConditionModel, "forward", {1, 2})
        whole = train_here(tmp_path, "run", *flags)
    capsys.readouterr()
    (tmp_path / "run" / "lora_weights").rename(tmp_path / "before")
    resumed = train_here(tmp_path, "run", *flags, "--resume_from_checkpoint", "checkpoint-2")
    printed = capsys.readouterr().out
    assert "gradient_checkpointing on instead of off, split 2 x 2 instead of 4 x 1" in printed
    assert "too little memory" not in printed
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    choices = json.loads((tmp_path / "run" / "checkpoint-4" / "training_state.json").read_text())[
        "choices"
    ]
    assert choices["gradient_checkpointing"] and choices["split"] == {"size": 2, "count": 2}
    started = json.loads((tmp_path / "run" / "training_config.json").read_text())["choices"]
    assert started == choices


def test_dropout_drops_the_same_when_a_step_is_computed_again(train_here, tmp_path, monkeypatch):
    """The second step's first try fails; gradient checkpointing computes its forward passes
    twice."""
    flags = [
        *FIXED,
        "--train_batch_size",
        2,
        "--gradient_accumulation_steps",
        2,
        "--lora_dropout",
        0.5,
    ]
    whole = train_here(tmp_path, "whole", *flags)
    fail_on(monkeypatch, UNet2DConditionModel, "forward", {4})
    short = train_here(tmp_path, "short", *flags)
    assert losses(tmp_path / "logs-short") == pytest.approx(
        losses(tmp_path / "logs-whole"), rel=1e-5
    )
    assert all(torch.allclose(whole[key], short[key], atol=1e-6) for key in whole)


def test_a_resumed_run_may_split_its_batch_otherwise(train_here, whole, tmp_path):
    train_here(tmp_path, "halves", *FIXED[:-1], 2, "--train_batch_size", 4)
    more = [
        "--train_batch_size",
        1,
        "--gradient_accumulation_steps",
        4,
        "--resume_from_checkpoint",
        "latest",
    ]
    halves = train_here(tmp_path, "halves", *FIXED, *more)
    assert learned_alike(whole[1], halves)


def test_when_nothing_is_left_a_line_says_what_would_fit(train_here, tmp_path, monkeypatch):
    fail_on(monkeypatch, UNet2DConditionModel, "forward", set(range(1, 100)))
    with pytest.raises(UserError, match=r"Even one image of 64 px .*--resolution 48"):
        train_here(tmp_path, "out", *FIXED)


def test_validation_generates_one_by_one_and_is_then_skipped(
    train_here, tmp_path, monkeypatch, capsys
):
    flags = [*FIXED, "--num_validation_images", 3, "--validation_steps", 2]
    flags += ["--validation_prompt", "a robot", "--resolution", 32]  # a prompt: no card images
    fail_on(
        monkeypatch, AutoencoderKL, "decode", {1}
    )  # the first try at step 0: the images fit one by one
    train_here(tmp_path, "one", *flags)
    assert {path.name for path in (tmp_path / "one").glob("samples-*")} == {
        "samples-0",
        "samples-2",
        "samples-4",
    }
    fail_on(
        monkeypatch, AutoencoderKL, "decode", set(range(1, 5))
    )  # both tries at step 0 and both at step 2
    train_here(tmp_path, "two", *flags)
    assert {path.name for path in (tmp_path / "two").glob("samples-*")} <= {
        "samples-2",
        "samples-4",
    }
    assert "step 0: no sample images" in capsys.readouterr().out
    assert (tmp_path / "two" / "lora_weights").is_dir()


def test_encoding_is_tried_again_in_smaller_parts(train_here, tmp_path, monkeypatch):
    whole = train_here(tmp_path, "whole", *FIXED, "--random_flip", "--cache_dir", "one")
    fail_on(monkeypatch, AutoencoderKL, "encode", {1})
    short = train_here(tmp_path, "short", *FIXED, "--random_flip", "--cache_dir", "two")
    encoded = [moments(tmp_path / name) for name in ("one", "two")]
    assert encoded[0].keys() == encoded[1].keys() and len(encoded[0]) > 8, (
        "eight images, and mirror images too"
    )
    for key, tensor in encoded[0].items():
        assert torch.allclose(tensor, encoded[1][key], rtol=1e-3, atol=1e-4)
    assert losses(tmp_path / "logs-short") == pytest.approx(
        losses(tmp_path / "logs-whole"), rel=1e-3
    )
    assert learned_alike(whole, short)
    config = json.loads((tmp_path / "short" / "training_config.json").read_text(encoding="utf-8"))
    assert config["settings"]["train_batch_size"] == 1


def test_tiles_that_encode_are_smaller_than_the_image(base_folder, monkeypatch):
    """The VAE's own tile would save nothing for an image of the training size."""
    vae = load_base(str(base_folder), torch.float32).vae
    sizes, encode = [], vae.encoder.forward
    monkeypatch.setattr(vae.encoder, "forward", lambda x: sizes.append(x.shape[2:]) or encode(x))
    fail_on(monkeypatch, AutoencoderKL, "encode", {1, 2})
    latents = VaeEncoder(vae).encode(torch.zeros(1, 3, 64, 64))
    assert latents.shape[2:] == (16, 16)
    assert len(sizes) > 1 and max(map(max, sizes)) == 32


def test_an_encoding_that_never_fits_ends_in_a_line(train_here, tmp_path, monkeypatch):
    fail_on(monkeypatch, AutoencoderKL, "encode", set(range(1, 100)))
    with pytest.raises(UserError, match="VAE"):
        train_here(tmp_path, "out", *FIXED, "--cache_dir", "cache")


@given(st.integers(1, 64), st.integers(1, 8))
def test_shrinking_keeps_the_effective_batch(size, count):
    batching = compute.MicroBatching(size, count)
    while smaller := batching.smaller():
        assert smaller.size * smaller.accumulation_steps == size * count
        assert smaller.size <= batching.size // 2
        batching = smaller
    assert batching.size == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")]
)
def test_every_kind_of_too_little_memory_is_known(error):
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes do not match"))

"""How steps are computed: chosen, printed, stored, taken over by a resumed run; the losses are the
same either way."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from diffusers.utils import is_xformers_available
from hypothesis import given
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaman.errors import UserError
from megaman.training.compute import (
    COMPILED_SHAPES,
    REQUESTS,
    XFORMERS,
    MicroBatching,
    choose_training_compute,
    prepare_unet,
    to_record,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # choosing for a GPU needs none
FLAGS = {
    "mixed_precision": "no",
    "memory_format": "auto",
    XFORMERS: False,
    "compile": False,
    "gradient_checkpointing": False,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}
SAVED = {
    "device": "cpu",
    "dtype": "bfloat16",
    "memory_format": "contiguous",
    "attention": "sdpa",
    "compile": False,
    "gradient_checkpointing": True,
    "vae_tile": 32,
    "split": {"size": 2, "count": 2},
    "asked": FLAGS,
}


def chosen(saved: Any = None, device: torch.device = CPU, **flags: Any):
    """The settings and the notes about them; flags are typed in addition to the defaults."""
    settings, notes = choose_training_compute({**FLAGS, **flags}, set(flags), device, 64, saved)
    return settings, "\n".join(notes)


def test_a_new_run_says_nothing_more():
    choices, said = chosen()
    assert set(FLAGS) == set(REQUESTS) and choices.requested == FLAGS
    assert (choices.dtype, choices.memory_format, choices.attention) == (
        torch.float32,
        "channels_last",
        "sdpa",
    )
    assert (choices.micro_batching, choices.vae_tile, said) == (MicroBatching(4, 1), 0, "")


def test_what_a_checkpoint_noted_is_taken_over_and_said():
    choices, said = chosen(SAVED)
    assert (choices.dtype, choices.memory_format, choices.gradient_checkpointing) == (
        torch.bfloat16,
        "contiguous",
        True,
    )
    assert (choices.micro_batching, choices.vae_tile) == (MicroBatching(2, 2), 32)
    for words in (
        "dtype bfloat16 instead of float32",
        "memory_format contiguous instead of channels_last",
        "gradient_checkpointing on instead of off",
        "split 2 x 2 instead of 4 x 1",
    ):
        assert words in said and said.count("\n") == 0


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ({"mixed_precision": "fp16"}, "dtype", "float32"),  # by the rule for a narrow UNet
        ({"mixed_precision": "no"}, "dtype", "bfloat16"),  # as then
        ({"memory_format": "channels_last"}, "memory_format", "channels_last"),
        ({"memory_format": "auto"}, "memory_format", "contiguous"),
        ({"train_batch_size": 4}, "split", "2 x 2"),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 4}, "split", "1 x 4"),
        (
            {"train_batch_size": 3},
            "split",
            "3 x 1",
        ),  # another number of images, which is refused later
    ],
)
def test_a_flag_that_says_something_else_wins(flags, name, value):
    choices, said = chosen(SAVED, **flags)
    found = to_record(choices)[name]
    assert value == (f"{found['size']} x {found['count']}" if name == "split" else found)
    assert choices.gradient_checkpointing and "gradient_checkpointing on" in said  # the rest stays


def test_what_was_asked_is_remembered_as_long_as_it_holds():
    """no, then nothing, then fp16: the third run is not bound by the request of the first."""
    first, _ = chosen(mixed_precision="no")
    saved = json.loads(json.dumps(SAVED | {"dtype": "float32", "asked": first.requested}))
    assert first.dtype == torch.float32
    second, _ = choose_training_compute({**FLAGS, "mixed_precision": "bf16"}, set(), CPU, 64, saved)
    assert second.dtype == torch.float32 and second.requested["mixed_precision"] == "no"
    saved["asked"] = second.requested
    third, _ = chosen(saved, mixed_precision="bf16")
    assert third.dtype == torch.bfloat16 and third.requested["mixed_precision"] == "bf16"


def test_another_kind_of_device_chooses_anew():
    choices, said = chosen(SAVED, CUDA, mixed_precision="fp16", compile=True)
    assert (choices.dtype, choices.micro_batching.size, choices.compile, choices.vae_tile) == (
        torch.float16,
        4,
        True,
        0,
    )
    assert "computed on cpu: chosen anew for cuda" in said
    assert not chosen({**SAVED, "device": "cuda", "compile": True})[0].compile


def test_what_only_an_nvidia_gpu_has_is_noted_elsewhere():
    requests: dict[str, Any] = {XFORMERS: True, "compile": True}
    choices, said = chosen(**requests)
    assert choices.attention == "sdpa" and not choices.compile
    assert "xformers needs an NVIDIA GPU" in said and "--compile is for NVIDIA GPUs" in said
    tampered = {**SAVED, "attention": "xformers", "compile": True}
    assert chosen(tampered)[0].attention == "sdpa" and not chosen(tampered)[0].compile


@pytest.mark.skipif(
    is_xformers_available(), reason="what is said without xformers: it is installed"
)
def test_xformers_has_to_be_installed():
    with pytest.raises(
        UserError, match=f"--{XFORMERS}: xformers is not installed.*pip install xformers"
    ):
        chosen(device=CUDA, **{XFORMERS: True})
    saved = {
        **SAVED,
        "device": "cuda",
        "attention": "xformers",
    }  # taken over, nobody would have asked for it
    assert chosen(saved, CUDA)[0].attention == "sdpa"


def test_compiled_blocks_keep_the_names_of_their_parameters(base_folder):
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    names = list(unet.state_dict())
    choices, _ = chosen(device=CUDA, compile=True)
    prepare_unet(unet, choices)
    assert list(unet.state_dict()) == names and to_record(choices)["compile"]
    assert any(module._compiled_call_impl for module in unet.modules())


ODD = [
    *([], {}, "float32", 1, True),
    {**SAVED, "dtype": "int8"},
    {**SAVED, "dtype": ["float32"]},
    {**SAVED, "split": {"size": 0, "count": 4}},
    {**SAVED, "split": {"size": 4}},
    {**SAVED, "vae_tile": True},
    {**SAVED, "compile": 1},
    {**SAVED, "vae_tile": -8},
    {**SAVED, "asked": None},
    {**SAVED, "asked": {"a": {}}},
    {key: value for key, value in SAVED.items() if key != "attention"},
]


@pytest.mark.parametrize("saved", ODD, ids=repr)
def test_an_odd_note_is_said_and_chosen_anew(saved):
    choices, said = chosen(saved)
    assert "damaged: chosen anew" in said and choices == chosen()[0]


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["size", "count", *REQUESTS]), inner)
    ),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from(list(SAVED)), json_value),
    st.sampled_from([CPU, CUDA, torch.device("mps")]),
)
def test_no_note_can_stop_a_run(changed, device):
    choices, _ = chosen({**SAVED, **changed}, device)
    assert choices.micro_batching.size * choices.micro_batching.accumulation_steps == 4


# Whole runs.


@pytest.fixture
def train(train_here, tmp_path, capsys):
    """train(output_dir, *flags): two images a step, saved at each; .said is what it printed."""

    def run(output_dir: str, *flags) -> dict[str, torch.Tensor]:
        fixed = [
            "--data_dir",
            ROOT / "demo" / "held_out",
            "--train_batch_size",
            2,
            "--learning_rate",
            1e-3,
        ]
        targets = ["--target_modules", "to_q", "conv1", "--lr_warmup_steps", 0, "--save_steps", 1]
        state = train_here(tmp_path, output_dir, *fixed, *targets, *flags)
        run.said = capsys.readouterr().out
        return state

    return run


def losses(folder) -> list[float]:
    (run,) = folder.iterdir()
    return [event.value for event in EventAccumulator(str(run)).Reload().Scalars("train/loss")]


def stored(folder) -> dict:
    return json.loads((folder / "training_state.json").read_text())["choices"]


def test_both_memory_formats_train_the_same(train, tmp_path):
    train("last", "--max_train_steps", 4)
    assert "; channels_last; sdpa; " in train.said
    train("plain", "--max_train_steps", 4, "--memory_format", "contiguous")
    assert "; contiguous; sdpa; " in train.said
    assert losses(tmp_path / "logs-last") == pytest.approx(
        losses(tmp_path / "logs-plain"), abs=1e-4
    )
    config = json.loads((tmp_path / "plain" / "training_config.json").read_text())
    assert (
        config["choices"]["memory_format"] == "contiguous"
        and config["choices"]["attention"] == "sdpa"
    )
    assert config["choices"] == stored(tmp_path / "plain" / "checkpoint-4")

    # From a checkpoint of contiguous steps without the flag; then from one of an early version,
    # which stores nothing.
    train("plain", "--max_train_steps", 5, "--resume_from_checkpoint", "checkpoint-4")
    assert "as in the checkpoint: memory_format contiguous instead of channels_last" in train.said
    assert stored(tmp_path / "plain" / "checkpoint-5")["memory_format"] == "contiguous"
    state = tmp_path / "last" / "checkpoint-4" / "training_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({key: value for key, value in content.items() if key != "choices"}))
    train("last", "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    assert "checkpoint-4, step 4" in train.said and "chosen anew" not in train.said


def test_bf16_trains_saves_resumes_bit_for_bit_and_generates(train, tmp_path):
    """Resumed without the flag: the checkpoint has it."""
    flags = ["--max_train_steps", 4, "--num_validation_images", 1, "--validation_steps", 4]
    whole = train("whole", *flags, "--mixed_precision", "bf16")
    assert "device     cpu: base in bf16, LoRA in float32; channels_last" in train.said
    assert (
        tmp_path / "whole" / "samples-4" / "00.png"
    ).is_file() and "no sample images" not in train.said
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert stored(tmp_path / "whole" / "checkpoint-4")["dtype"] == "bfloat16"

    resumed = train(
        "halves", *flags, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2"
    )
    assert "dtype bfloat16 instead of float32" in train.said
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    moments = [
        load_file(tmp_path / name / "checkpoint-4" / "optimizer.safetensors")
        for name in ("whole", "halves")
    ]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    images = [
        (tmp_path / name / "samples-4" / "00.png").read_bytes() for name in ("whole", "halves")
    ]
    assert images[0] == images[1]


def test_every_shape_of_every_block_is_compiled(monkeypatch):
    """torch gives up after eight variants of a forward, which all blocks of a kind share."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    compute, _ = chosen(device=CUDA, compile=True)
    limits: list[int] = []
    unet = SimpleNamespace(
        compile_repeated_blocks=lambda: limits.append(torch._dynamo.config.recompile_limit)
    )
    prepare_unet(cast(Any, unet), compute)
    assert limits == [COMPILED_SHAPES]

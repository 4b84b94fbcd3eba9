"""Weights: the libraries' values, each model loaded on demand, with no more memory than needed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from megaman.errors import UserError
from megaman.models import weights
from megaman.models.base import Base, load_base, vae_identity
from megaman.models.typed import unet_config, vae_config
from megaman.sampling.jobs import Job
from megaman.training.validation import Validation, ValidationSettings

KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def own_copy(base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "own")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def weights_of(folder: Path, part: str) -> Path:
    return folder / part / f"{FILES[part]}.safetensors"


def line_of(base: Base, part: str) -> str:
    """The one line with which a part is not loaded."""
    with pytest.raises(UserError) as caught:
        getattr(base, part)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_it_is(folder: Path, part: str) -> None:
    pass


def of_the_fp16_variant(folder: Path, part: str) -> None:
    path = weights_of(folder, part)
    save_file(
        {key: value.half() for key, value in load_file(path).items()},
        path.with_suffix(".fp16.safetensors"),
    )
    path.unlink()


def in_float32(folder: Path, part: str) -> None:
    path = weights_of(folder, part)
    numbers = torch.Generator().manual_seed(0)  # that no half precision holds
    save_file(
        {
            key: torch.randn(value.shape, generator=numbers)
            for key, value in load_file(path).items()
        },
        path,
        {"format": "pt"},
    )


def in_shards(folder: Path, part: str) -> None:
    model = KINDS[part].from_pretrained(folder / part)
    weights_of(folder, part).unlink()
    model.save_pretrained(folder / part, max_shard_size="1MB")
    assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1


def with_more_than_is_needed(folder: Path, part: str) -> None:
    path = weights_of(folder, part)
    save_file(
        {**load_file(path), "vision_model.x": torch.tensor([torch.nan]), "none": torch.zeros(0)},
        path,
        {"format": "pt"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize(
    "stored",
    [as_it_is, of_the_fp16_variant, in_float32, in_shards, with_more_than_is_needed],
    ids=lambda way: way.__name__,
)
def test_the_same_numbers_as_the_libraries_load(own_copy, monkeypatch, part, stored, dtype):
    monkeypatch.setattr(weights, "PORTION", 100_000)
    stored(own_copy, part)
    variant = "fp16" if stored is of_the_fp16_variant else None
    theirs = KINDS[part].from_pretrained(
        own_copy / part,
        variant=variant,
        use_safetensors=True,
        dtype=torch.float32 if part == "vae" else dtype,
    )
    ours = getattr(load_base(str(own_copy), dtype), part)
    wanted, found = theirs.state_dict(), ours.state_dict()
    assert wanted.keys() == found.keys()
    assert all(
        torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype
        for name in wanted
    )
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("old", [True, False])
def test_a_vae_whose_attention_has_the_old_names(own_copy, old):
    """As the published VAE of Stable Diffusion 1.5."""
    config = json.loads((own_copy / "vae" / "config.json").read_text())
    vae = AutoencoderKL.from_config({**config, "mid_block_add_attention": True})
    cast(AutoencoderKL, vae).save_pretrained(own_copy / "vae")
    path = weights_of(own_copy, "vae")
    stored = load_file(path)
    for new, word in OLD.items() if old else []:
        stored = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{word}."): stored[key]
            for key in stored
        }
    assert sum(".query." in key or ".proj_attn." in key for key in stored) == (8 if old else 0)
    save_file(stored, path, {"format": "pt"})
    theirs = AutoencoderKL.from_pretrained(own_copy / "vae").state_dict()
    found = load_base(str(own_copy), torch.float32).vae.state_dict()
    assert theirs.keys() == found.keys() and all(
        torch.equal(found[name], theirs[name]) for name in theirs
    )


def test_text_encoders_of_earlier_versions(own_copy):
    path = weights_of(own_copy, "text_encoder")
    stored = load_file(path)
    save_file({f"text_model.{key}": value for key, value in stored.items()}, path, {"format": "pt"})
    found = load_base(str(own_copy), torch.float16).text_encoder.state_dict()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_tensors_in_portions_each_once_in_the_files_order(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PORTION", 1000)
    stored = {
        f"{number}": torch.full((number * 7 % 50,), float(number)) for number in range(1, 100)
    }
    save_file(stored, tmp_path / "x.safetensors")
    wanted = [name for name in stored if int(name) % 3]
    opened = []
    real = weights.safe_open
    monkeypatch.setattr(
        weights, "safe_open", lambda *where, **how: opened.append(where) or real(*where, **how)
    )
    found = [
        (name, tensor.clone()) for name, tensor in weights.read(tmp_path / "x.safetensors", wanted)
    ]
    assert sorted(name for name, _ in found) == sorted(wanted)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found)
    size = sum(stored[name].nbytes for name in wanted)
    assert size / 1200 <= len(opened) - 1 <= size / 1000 + 1, "the order is read once"
    with real(tmp_path / "x.safetensors", framework="pt") as file:
        order = [name for name in file.offset_keys() if name in wanted]
    assert [name for name, _ in found] == order


def test_what_no_file_fills_is_missing():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("kernel", torch.ones(3), persistent=False)

    model = Odd()
    assert weights.missing(model, model.state_dict()) == "kernel"
    assert weights.missing(model, {}) == "layer.weight"


# When a part is loaded.


@pytest.mark.parametrize("part", KINDS)
def test_a_part_is_not_loaded_until_it_is_asked_for(own_copy, part):
    base = load_base(str(own_copy), torch.float32)
    path = weights_of(own_copy, part)
    path.rename(aside := path.with_suffix(".aside"))
    factor, size, scale = base.vae_scale_factor, base.native_size, base.scaling_factor
    for other in KINDS.keys() - {part}:
        assert getattr(base, other).state_dict()
    assert f"{path} is gone or has changed since the start" in line_of(base, part)
    aside.rename(path)
    assert getattr(base, part) is getattr(base, part), "kept"
    vae = vae_config(base.vae)
    assert factor == 2 ** (len(vae.block_out_channels) - 1) == base.vae_scale_factor
    assert size == unet_config(base.unet).sample_size * factor == base.native_size
    assert scale == vae.scaling_factor == base.scaling_factor


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_files_that_changed_meanwhile(own_copy, file):
    base = load_base(str(own_copy), torch.float32)
    path = own_copy / "vae" / file
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert f"{path} is gone or has changed" in line_of(base, "vae")
    assert load_base(str(own_copy), torch.float32).vae


def test_a_part_that_was_let_go_comes_back_from_its_files(own_copy):
    base = load_base(str(own_copy), torch.bfloat16)
    unet, vae = base.unet, base.vae
    first, gone = (
        {name: tensor.clone() for name, tensor in vae.state_dict().items()},
        weakref.ref(vae),
    )
    vae.enable_tiling()
    next(vae.parameters()).data.zero_()
    base.release("vae", "text_encoder")
    del vae
    assert gone() is None
    assert all(torch.equal(tensor, first[name]) for name, tensor in base.vae.state_dict().items())
    assert not base.vae.use_tiling and base.unet is unet


def test_loading_leaves_the_random_numbers_alone(own_copy):
    base = load_base(str(own_copy), torch.float32)
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    for _ in range(2):
        assert base.unet and base.vae and base.text_encoder
        base.release(*KINDS)
    assert torch.equal(torch.randn(3), wanted)


def test_sample_images_without_their_vae_are_skipped(own_copy, caplog):
    caplog.set_level(logging.INFO)
    base = load_base(str(own_copy), torch.float32)
    states = torch.zeros(77, unet_config(base.unet).cross_attention_dim)
    validation = Validation(
        base,
        {"x": states, "": states},
        ValidationSettings(64),
        nullcontext,
        lambda: None,
    )
    base.unet.train()
    weights_of(own_copy, "vae").unlink()
    job = Job(0, 0, "x", "", seed=0, width=64, height=64, num_inference_steps=1, guidance_scale=7)
    assert validation.generate(3, own_copy / "samples-3", [job]) == {}
    (line,) = caplog.messages
    assert "step 3: no sample images" in line and "is gone" in line
    assert "training continues" in line and base.unet.training


# Which VAE it is.


def test_a_vaes_identity_hangs_on_its_numbers_alone(own_copy, tmp_path):
    base = load_base(str(own_copy), torch.float32)
    assert base.vae_files() == [own_copy / "vae" / "config.json", weights_of(own_copy, "vae")]
    identity = vae_identity(base.vae)
    assert len(identity) == 64 and set(identity) <= set("0123456789abcdef")
    in_shards(own_copy, "vae")  # in float32, which holds float16's numbers
    sharded = load_base(str(own_copy), torch.bfloat16)
    assert vae_identity(sharded.vae) == identity
    assert {path.name for path in sharded.vae_files()} == {
        path.name for path in (own_copy / "vae").iterdir()
    }
    with torch.no_grad():
        next(sharded.vae.parameters()).view(-1)[3] += 1e-3
    assert vae_identity(sharded.vae) != identity
    config = own_copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "act_fn": "relu"}))
    assert vae_identity(load_base(str(own_copy), torch.float32).vae) != identity


# What loading takes.

PEAK = """
import sys
import torch
from megaman.models.base import load_base

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

base = load_base(sys.argv[1], torch.bfloat16)
assert base.text_encoder and base.vae  # small: whatever the first load brings with it
before = peak()
assert base.unet.dtype == torch.bfloat16
print(peak() - before, 2 * base.unet.num_parameters())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_load_takes_the_model_and_a_portion(own_copy, embedded_base, forked):
    config = json.loads((embedded_base / "unet" / "config.json").read_text())
    config["block_out_channels"] = [96, 192, 384, 384]
    unet = weights.build(UNet2DConditionModel, config)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in unet.state_dict().items()}
    save_file(zeros, weights_of(own_copy, "unet"))
    unet.save_config(own_copy / "unet")
    done = forked.run(["-c", PEAK, own_copy], own_copy, {"megaman.models.weights.PORTION": 2**23})
    assert done.returncode == 0, done.stderr
    rise, size = map(int, done.stdout.split())
    assert size > 50e6
    assert size * 0.5 < rise < size * 1.5, "with the whole file it would be three times the size"

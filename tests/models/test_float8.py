"""A base stored in float8: the gradients of one that is rounded to it, in half the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FEW_TARGETS, ROOT
from diffusers import UNet2DConditionModel

from megaman import runtime
from megaman.errors import UserError
from megaman.lora import adapter
from megaman.lora.stack import LoraStack
from megaman.models import float8
from megaman.models.base import load_base
from megaman.models.float8 import KEPT, LAYERS, decode, encode, store_in_float8
from megaman.models.typed import predict_noise, unet_config
from megaman.training.memory_saving import checkpoint_gradients

TARGETS = ["to_q", "to_v", "conv1", "ff.net.2"]


def test_a_weight_keeps_three_bits_behind_its_first():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] *= 1e-4  # each output channel has its own scale
    weight[3] = 0
    stored, scale = encode(weight)
    assert (stored.dtype, scale.shape) == (torch.uint8, (6, 1, 1, 1))
    error = (decode(stored, scale, torch.float32) - weight).abs()
    largest = weight.abs().amax((1, 2, 3), keepdim=True)
    assert (error <= weight.abs() / 16 + largest / 448 / 512).all()
    assert torch.equal(decode(stored, scale, torch.float32)[3], weight[3])


def unet_with_lora(base_folder, in_float8: bool, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """The base's UNet with a random LoRA: stored in float8, or rounded to it."""
    last = torch.channels_last
    unet = load_base(str(base_folder), dtype, memory_format=last).unet
    if not in_float8:
        for name, layer in unet.named_modules():
            if type(layer) in LAYERS and name not in KEPT:
                weight: Any = layer.weight
                weight.data = decode(*encode(weight), dtype)
    parameters = adapter.inject(unet, 4, 4, TARGETS)
    if in_float8:
        store_in_float8(unet)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return unet.train(), parameters


def gradients(unet: UNet2DConditionModel, parameters: list[Any], dtype: torch.dtype):
    generator, config = torch.Generator().manual_seed(2), unet_config(unet)
    noisy = torch.randn(1, config.in_channels, 8, 8, generator=generator).to(dtype)
    embeds = torch.randn(1, 9, config.cross_attention_dim, generator=generator).to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        noise_pred = predict_noise(unet, noisy, torch.tensor([300]), embeds)
    noise_pred.float().square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_rounded_base(base_folder, dtype):
    rounded = gradients(*unet_with_lora(base_folder, False, dtype), dtype)
    for checkpointing in (False, True):
        unet, parameters = unet_with_lora(base_folder, True, dtype)
        if checkpointing:
            checkpoint_gradients([unet])
        found = gradients(unet, parameters, dtype)
        assert (found - rounded).norm() < 1e-3 * rounded.norm()


def test_each_layer_but_the_first_and_the_last_is_one_byte_a_weight(base_folder):
    unet, parameters = unet_with_lora(base_folder, True, torch.float16)
    plain = load_base(str(base_folder), torch.float16).unet
    large = sum(tensor.nbytes for tensor in [*unet.parameters(), *unet.buffers()])
    large -= sum(parameter.nbytes for parameter in parameters)
    assert large < 0.56 * sum(parameter.nbytes for parameter in plain.parameters())
    assert unet.dtype == torch.float16, "what sampling casts its latents to"
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_a_run_saves_resumes_and_is_loaded_on_the_plain_base(
    train_here, base_folder, tmp_path, capsys
):
    flags = ["--data_dir", ROOT / "demo" / "held_out", "--resolution", 32, *FEW_TARGETS]
    flags += ["--max_train_steps", 2, "--save_steps", 1, "--learning_rate", 1e-3]
    whole = train_here(tmp_path, "out", *flags, "--base_precision", "fp8")
    assert "the UNet is stored in fp8, which is slower" in capsys.readouterr().out
    (tmp_path / "out" / "lora_weights").rename(tmp_path / "before")
    again = [*flags, "--resume_from_checkpoint", "checkpoint-1"]
    with pytest.raises(UserError, match="base_precision was fp8 and is now same"):
        train_here(tmp_path, "out", *again)
    resumed = train_here(tmp_path, "out", *again, "--base_precision", "fp8")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert any(tensor.any() for key, tensor in whole.items() if "lora_B" in key)
    base = load_base(str(base_folder), torch.float32)
    LoraStack(base, [(tmp_path / "out" / "lora_weights", 1.0)], fuse=True, rescale=False)


def test_a_mac_refuses_it_in_a_line(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "choose_device", lambda: torch.device("mps"))
    flags = ["--data_dir", ROOT / "demo" / "held_out", "--max_train_steps", 1]
    with pytest.raises(UserError, match="no float8 on Apple's GPUs"):
        train_here(tmp_path, "out", *flags, "--base_precision", "fp8")


def test_a_layer_follows_autocast_and_its_input():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3)).requires_grad_(False)
    float8.store_in_float8(layer)
    x = torch.randn(2, 4)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16

"""The fast layers are PEFT's: outputs and gradients, and where they leave the work to PEFT."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import nn

from megaman.lora import forward as lora_forward
from megaman.lora import saving
from megaman.lora.adapter import (
    ADAPTER,
    FusedLoras,
    _layers,
    inject,
    lora_disabled,
    parameters,
    set_scales,
)
from megaman.models.typed import move

TOLERANCE = 2e-6  # of the largest element: float32's last bits
RANK = 4


class Layers(nn.Module):
    """One layer of each kind; x is [batch, 8, 6, 6]. In wide the linear layers have more weights
    than inputs."""

    def __init__(self, wide: bool = False, channels_last: bool = True):
        super().__init__()
        torch.manual_seed(0)
        inner = 192 if wide else 12
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.up, self.back = nn.Linear(16, inner), nn.Linear(inner, 16, bias=False)
        self.requires_grad_(False)
        if channels_last:
            move(self, memory_format=torch.channels_last)

    def forward(self, x):
        x = torch.tanh(self.pointwise(torch.tanh(self.down(self.first(x)))))
        return self.back(torch.tanh(self.up(x.permute(0, 2, 3, 1))))


TARGETS = ["first", "down", "pointwise", "up", "back"]


def with_lora(model, alpha=RANK, fast=True, adapter=ADAPTER, **settings):
    """The model with a LoRA whose both halves are random, by our layers or by PEFT's own."""
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=TARGETS, **settings)
    if fast:
        config._register_custom_module(lora_forward.FAST_LAYERS)
    inject_adapter_in_model(config, model, adapter)
    torch.manual_seed(1)
    for parameter in parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    lora_forward.match_memory_format(model)  # PEFT's too: its bits may differ with it
    return model


def results(model, dtype=torch.float32):
    """The output, and the gradients of the input and of all parameters by name."""
    torch.manual_seed(2)
    x = torch.randn(2, 8, 6, 6).to(dtype).requires_grad_()
    y = model(x)
    (y.float() * torch.randn(y.shape)).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{name: value.grad for name, value in parameters(model).items()},
    }


def distance(ours, peft) -> float:
    assert ours.keys() == peft.keys()
    return max(
        float((ours[name] - peft[name]).abs().max() / peft[name].abs().max()) for name in peft
    )


@pytest.fixture
def fused(monkeypatch) -> list[str]:
    """The kinds of the layers that computed by themselves instead of by PEFT's forward."""
    kinds = []
    plain = lora_forward._is_plain

    def noted(layer, x):
        if answer := plain(layer, x):
            kinds.append(type(layer).__name__)
        return answer

    monkeypatch.setattr(lora_forward, "_is_plain", noted)
    return kinds


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("wide", [False, True], ids=["merged", "separate"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 10}, {"alpha": 3, "use_rslora": True}])
def test_outputs_and_gradients_are_those_of_peft(settings, wide, channels_last, fused):
    ours = results(with_lora(Layers(wide, channels_last), **settings))
    assert sorted(fused) == 3 * ["FastConv2d"] + 2 * ["FastLinear"]
    peft = results(with_lora(Layers(wide, channels_last), fast=False, **settings))
    assert len(peft) == 2 + 2 * len(TARGETS)
    assert distance(ours, peft) <= TOLERANCE


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "merges"), [(64, 512, 1024, True), (320, 320, 64, False)]
)
def test_merging_is_for_many_rows(inputs, outputs, rows, merges):
    assert (
        lora_forward._merging_pays(torch.empty(rows, inputs), torch.empty(outputs, inputs))
        == merges
    )


def test_no_gradient_for_an_input_that_needs_none(fused):
    model = with_lora(Layers())
    x = torch.randn(2, 3, 16)
    model.up(x).sum().backward()
    assert x.grad is None
    assert fused == ["FastLinear"]
    grad = model.get_parameter("up.lora_A.default.weight").grad
    assert grad is not None and grad.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_bits():
    from torch.utils.checkpoint import checkpoint

    model = with_lora(Layers(), alpha=10)
    whole = results(model)
    model.zero_grad()
    again = results_of_checkpoint(lambda x: checkpoint(model, x, use_reentrant=False), model)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def results_of_checkpoint(forward, model):
    model_like = type(
        "Forward",
        (),
        {"__call__": staticmethod(forward), "named_parameters": model.named_parameters},
    )
    return results(model_like())


def both(change, channels_last=True, **settings):
    """Results by ours and by PEFT after change(model)."""
    found = []
    for fast in (True, False):
        model = with_lora(Layers(channels_last=channels_last), fast=fast, alpha=10, **settings)
        change(model)
        torch.manual_seed(3)  # for dropout
        found.append(results(model))
    return found


def same_bits(ours, peft) -> bool:
    return all(torch.equal(ours[name], peft[name]) for name in peft if peft[name] is not None)


def test_dropout_is_left_to_peft(fused):
    assert same_bits(*both(lambda model: model.train(), lora_dropout=0.5))
    assert not fused
    ours, peft = both(lambda model: model.eval(), lora_dropout=0.5)
    assert fused
    assert distance(ours, peft) <= TOLERANCE


def test_what_is_not_plain_is_left_to_peft(fused):
    def second(model):
        config = LoraConfig(r=2, target_modules=TARGETS)
        inject_adapter_in_model(config, model, "second")
        set_scales([model], {0: 1.0})
        for layer in _layers([model]):
            layer.set_adapter(["default", "second"])

    def merged(model):
        for layer in _layers([model]):
            layer.merge()

    assert same_bits(*both(second))
    assert same_bits(*both(lambda model: None, channels_last=False, use_dora=True))
    ours, peft = (with_lora(Layers(), fast=fast, alpha=10) for fast in (True, False))
    for model in (ours, peft):
        merged(model)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(ours(x), peft(x))
    assert not fused


def test_sampling_has_pefts_bits(fused):
    ours, peft = (with_lora(Layers(), fast=fast, alpha=10) for fast in (True, False))
    with torch.no_grad():
        x = torch.randn(2, 8, 6, 6)
        assert torch.equal(ours(x), peft(x))
    assert not fused


def test_a_bf16_base_and_autocast_are_left_to_peft(fused):
    def in_bf16(fast):
        model = with_lora(Layers(), fast=fast).to(torch.bfloat16)
        for parameter in parameters(model).values():
            parameter.data = parameter.data.float()
        return results(model, torch.bfloat16)

    assert same_bits(in_bf16(True), in_bf16(False))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(*both(lambda model: None))
    assert not fused


def test_strengths_and_switching_off_are_honored(fused):
    ours, peft = both(lambda model: set_scales([model], {0: 0.3}))
    assert distance(ours, peft) <= TOLERANCE
    assert fused
    fused.clear()
    model = with_lora(Layers())
    x = torch.randn(2, 8, 6, 6)
    with lora_disabled(model):
        assert torch.equal(model(x), Layers()(x))
    assert not fused
    assert not torch.equal(model(x), Layers()(x))
    assert fused


def test_inject_makes_fast_layers_that_are_pefts_to_everyone(base_folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    move(unet, memory_format=torch.channels_last)
    plain = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    inject(unet, RANK, RANK, ["to_q", "conv1"])
    plain.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "conv1"]))
    layers = _layers([unet])
    assert {type(layer) for layer in layers} == {lora_forward.FastLinear, lora_forward.FastConv2d}
    assert all(isinstance(layer, (Linear, Conv2d)) for layer in layers)
    assert list(parameters(unet)) == list(parameters(plain))
    assert saving.config_dict(unet).keys() == saving.config_dict(plain).keys()
    for layer in layers:
        if isinstance(layer, Conv2d):
            a = cast(torch.Tensor, layer.lora_A["default"].weight)
            assert a.is_contiguous(memory_format=torch.channels_last)
            assert a.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_alone_casts_and_gradients_keep_their_bits(monkeypatch, dtype):
    """PEFT casts each input to float32 before autocast casts it back."""
    casts: dict[str, list[torch.dtype]] = {"ours": [], "peft": []}

    def gradients(name: str) -> dict[str, torch.Tensor]:
        model = with_lora(move(Layers(), dtype))
        for parameter in parameters(model).values():
            parameter.data = parameter.data.float()
        for layer in _layers([model]):
            layer.lora_A[ADAPTER].register_forward_pre_hook(
                lambda _, x: casts[name].append(x[0].dtype)
            )
        with torch.autocast("cpu", dtype):
            return results(model, dtype)

    ours = gradients("ours")
    monkeypatch.setattr(
        lora_forward._NoDoubleCast, "_cast_input_dtype", LoraLayer._cast_input_dtype
    )
    peft = gradients("peft")
    assert set(casts["ours"]) == {dtype} and set(casts["peft"]) == {torch.float32}
    assert all(torch.equal(ours[key], peft[key]) for key in peft)


def test_loras_are_merged_on_the_cpu_wherever_the_model_is(monkeypatch):
    """Else the first merge, before the model moves to a GPU, would differ from later ones."""
    places: list[str] = []

    def merge(layer, *args, **kwargs):
        places.append(layer.get_base_layer().weight.device.type)
        real(layer, *args, **kwargs)

    real = Linear.merge
    monkeypatch.setattr(Linear, "merge", merge)
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
    layer: Any = model[0]
    nn.init.normal_(layer.lora_B[ADAPTER].weight)
    original = layer.get_base_layer().weight.detach().clone()
    fused = FusedLoras([model], reversible=True)
    fused.set_scales({0: 1.0})
    merged = layer.get_base_layer().weight.detach().clone()
    assert not torch.equal(merged, original)
    fused.set_scales({0: 0.0})
    assert torch.equal(layer.get_base_layer().weight, original)
    fused.set_scales({0: 1.0})
    assert torch.equal(layer.get_base_layer().weight, merged)
    weight = move(layer.get_base_layer(), "meta").weight
    fused.set_scales({0: 0.5})
    assert layer.get_base_layer().weight is weight and weight.device.type == "meta"
    assert places == ["cpu"] * 4

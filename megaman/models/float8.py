"""Frozen weights in float8, of which every pass computes the layer's own precision again.

Half the memory of fp16: each weight is one byte, and each output channel has a scale that brings
its largest weight to float8's largest number (e4m3fn, Micikevicius et al. 2022, arXiv 2209.05433).
The weights in the run's precision exist only while their layer computes, forward and backward, so
autograd keeps none of them, and gradient checkpointing sees the same tensors twice. (diffusers'
layerwise casting fails with gradient checkpointing, and without it autograd keeps every cast
weight.) The layers' inputs get gradients, their weights never do.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from megaman.errors import WRONG_USAGE, UserError

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
STORED, SCALE = "float8_weight", "float8_scale"  # buffers of a layer
# The first and the last layer see latents, and cost nothing.
KEPT = ("conv_in", "conv_out")


def require_float8(device: torch.device) -> None:
    """Raise UserError if torch has no float8 on the device."""
    if device.type == "mps":
        raise UserError(
            "--base_precision fp8: PyTorch has no float8 on Apple's GPUs", "Omit it", WRONG_USAGE
        )


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, ...] in float8, as bytes, and the scale [out, 1, ...] of each output channel
    in float32.

    As bytes, since no conversion of a whole model touches those, and processes can exchange them.
    """
    dims = tuple(range(1, weight.dim()))
    largest = weight.detach().float().abs().amax(dims, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (weight.detach().float() / scale).to(FLOAT8).view(torch.uint8), scale


def decode(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in dtype."""
    return stored.view(FLOAT8).to(dtype) * scale.to(dtype)


class _Linear(torch.autograd.Function):
    """y = x W^T + bias for x [..., in]; gradients for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        return functional.linear(x, decode(stored, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored, scale = ctx.saved_tensors
        return grad @ decode(stored, scale, grad.dtype), None, None, None


class _Conv2d(torch.autograd.Function):
    """A convolution of x [B, in, H, W]; gradients for x. form is stride, padding, dilation and
    groups."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stored: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        form: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.shape, ctx.form = x.shape, form
        return functional.conv2d(x, decode(stored, scale, x.dtype), bias, *form)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored, scale = ctx.saved_tensors
        weight = decode(stored, scale, grad.dtype)
        return conv2d_input(ctx.shape, weight, grad, *ctx.form), None, None, None, None


def _inputs(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x and the bias in the precision that the layer would compute in, the weight as it is
    stored."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = cast("Tensor | None", layer.bias)
    bias = None if bias is None else bias.to(dtype)
    return x.to(dtype), layer.get_buffer(STORED), layer.get_buffer(SCALE), bias


class Float8Linear(nn.Linear):
    """An nn.Linear whose weight is stored in float8."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in the bias's precision or float32; PEFT reads device and dtype of it."""
        return _weight(self)

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Linear.apply(*_inputs(self, input)))


class Float8Conv2d(nn.Conv2d):
    """An nn.Conv2d whose weight is stored in float8."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in the bias's precision or float32; PEFT reads device and dtype of it."""
        return _weight(self)

    def forward(self, input: Tensor) -> Tensor:
        form = (self.stride, self.padding, self.dilation, self.groups)
        return cast(Tensor, _Conv2d.apply(*_inputs(self, input), form))


def _weight(layer: nn.Module) -> Tensor:
    bias = cast("Tensor | None", layer.bias)
    dtype = torch.float32 if bias is None else bias.dtype
    return decode(layer.get_buffer(STORED), layer.get_buffer(SCALE), dtype)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Float8Linear,
    nn.Conv2d: Float8Conv2d,
}


def store_in_float8(model: nn.Module) -> None:
    """Store the weights of the model's linear and convolution layers in float8, in place.

    Layers with a LoRA keep it: only its base layer changes.
    """
    for name, layer in model.named_modules():
        kind = LAYERS.get(type(layer))
        is_lora = any(part.startswith("lora_") for part in name.split("."))
        if kind is None or is_lora or name in KEPT:
            continue
        stored, scale = encode(cast(Tensor, layer.weight))
        del layer._parameters["weight"]
        layer.__class__ = kind
        layer.register_buffer(STORED, stored)
        layer.register_buffer(SCALE, scale)

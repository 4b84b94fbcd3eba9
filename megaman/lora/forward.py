"""PEFT's LoRA layers with a faster forward and backward pass; results differ in the last bits.

PEFT computes y = W x + scale * B (A x) one operation at a time, and so does autograd backward. The
multiplication by the scale and the additions each read and write a tensor as large as y or x, and
in a small model the dispatch of every operation costs time as well. Here the matrix products add in
place and include the scale.

This path is for training steps only: one plain adapter in the base layer's dtype, without dropout
and autocast. In all other cases PEFT computes, in sampling too, so that a validation image has the
same bits as one generated later.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional


class _LinearWithLora(torch.autograd.Function):
    """y = x W^T + bias + scale * (x A^T) B^T, with gradients for x, A and B.

    x [..., in], W [out, in], bias [out] or None, A [rank, in], B [out, rank].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        low = None  # x A^T [rows, rank]
        if _merging_pays(x, weight):
            weight = torch.addmm(weight, b, a, alpha=scale)
            y = functional.linear(x, weight, bias)
        else:
            y = functional.linear(x, weight, bias)
            low = functional.linear(x, a).flatten(0, -2)
            y.flatten(0, -2).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        grad, rows, merged = grad.flatten(0, -2), x.flatten(0, -2), low is None
        if merged:
            low = rows @ a.t()
        grad_low = grad @ b
        grad_b = (low.t() @ grad).t()  # grad.t() @ low takes MKL twice as long
        if ctx.scale != 1:
            grad_low *= ctx.scale
            grad_b *= ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if not merged:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_low.t() @ rows, grad_b, None


def _merging_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether W + scale * B A needs less work than B (A x), and less than half the memory of x and
    y."""
    outputs, inputs = weight.shape
    return x.numel() // inputs * (inputs + outputs) > 2 * inputs * outputs


class _NoDoubleCast(LoraLayer):
    """Leaves it to autocast to cast A's input.

    PEFT casts to A's dtype, float32, and autocast back again: a third of a step's operators in
    half precision, and 6 % of its activations. With dropout the cast in between changes bits.
    """

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        is_vanilla = not self.lora_variant and all(
            isinstance(dropout, nn.Identity) for dropout in self.lora_dropout.values()
        )
        if x is not None and is_vanilla and torch.is_autocast_enabled(x.device.type):
            return x
        return super()._cast_input_dtype(x, dtype)


class FastLinear(_NoDoubleCast, Linear):
    """PEFT's layer for nn.Linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        is_frozen_linear = type(base) is nn.Linear and not base.weight.requires_grad
        if args or kwargs or not is_frozen_linear or not _is_plain(self, x):
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return _LinearWithLora.apply(x, base.weight, base.bias, a, b, self.scaling[adapter])


class FastConv2d(_NoDoubleCast, Conv2d):
    """PEFT's layer for nn.Conv2d; Python's overhead would outweigh any further saving."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or type(self.base_layer) is not nn.Conv2d or not _is_plain(self, x):
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        change = self.lora_B[adapter](self.lora_A[adapter](x))
        return self.base_layer(x).add_(change, alpha=self.scaling[adapter])


def _is_plain(layer: LoraLayer, x: Tensor) -> bool:
    """Whether the layer computes y = W x + scale * B (A x) for training, all in one dtype."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False  # a compiler fuses PEFT's operations itself
    adapters = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(adapters) != 1:
        return False
    (adapter,) = adapters
    if adapter not in layer.lora_A or adapter in layer.lora_variant or layer.lora_bias[adapter]:
        return False
    is_training = cast(nn.Module, layer).training
    if is_training and not isinstance(layer.lora_dropout[adapter], nn.Identity):
        return False
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    same_dtype = x.dtype == layer.base_layer.weight.dtype == a.dtype == b.dtype
    return same_dtype and not torch.is_autocast_enabled(x.device.type)


def match_memory_format(model: nn.Module) -> None:
    """Give every convolution's A the memory format of its base layer, so that steps need not
    convert."""
    layers = [layer for layer in model.modules() if isinstance(layer, Conv2d)]
    for layer in layers:
        if _is_channels_last(cast(Tensor, layer.get_base_layer().weight)):
            for convolution in layer.lora_A.values():
                weight = cast(nn.Parameter, convolution.weight)
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


FAST_LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, nn.Conv2d: FastConv2d}

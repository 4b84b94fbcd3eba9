"""The exponential moving average of a LoRA's parameters, and LoRAs that take each other's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

MAX_DECAY = 0.9999  # as diffusers' EMAModel; runs of less than 90,000 steps stay below


class LoraEma:
    """The average of the parameters over the last tenth of the steps, about, in float32.

    The decay is that of diffusers' EMAModel, (1 + n) / (10 + n) after n updates, which depends on
    the step alone: the tensors are all there is to save.

    Args:
        parameters: those of the LoRA by name.
        saved: the averages in a checkpoint, or None to begin with the parameters as they are.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        saved: Mapping[str, torch.Tensor] | None = None,
    ):
        self._parameters: list[torch.Tensor] = list(parameters.values())
        values = saved or parameters
        self.tensors: dict[str, torch.Tensor] = {
            # With the strides of the parameter, so that a resumed run computes the same bits.
            name: torch.empty_like(parameter, requires_grad=False).copy_(values[name].detach())
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the parameters after step 1, 2, ..."""
        torch._foreach_lerp_(list(self.tensors.values()), self._parameters, 1 - decay_at(step))


def decay_at(step: int) -> float:
    """The share of the average that step 1, 2, ... leaves: nothing of what was before the first."""
    updates = step - 1
    return min(MAX_DECAY, (1 + updates) / (10 + updates)) if updates else 0.0


@contextmanager
def loaded(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Within this context the parameters have the values of the tensors of the same names."""
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _copy(parameters, tensors)
    try:
        yield
    finally:
        _copy(parameters, values)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])

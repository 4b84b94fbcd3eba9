"""What a checkpoint holds of an optimizer: tensors as safetensors, numbers as JSON.

AdamW's state is tensors alone. AdamW8bit counts each parameter's steps in an int, and so does
Prodigy, whose estimate of the learning rate is numbers of its parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from megaman import schema
from megaman.errors import UserError
from megaman.files import read_json, write_json
from megaman.lora.files import Tensors, read_tensors
from megaman.lora.saving import write_tensors

TENSORS = "optimizer.safetensors"
NUMBERS = "optimizer.json"  # of optimizers that have any
Parameters = Mapping[str, torch.nn.Parameter]
REMEDY = "Resume from an earlier checkpoint"
# What the codes of AdamW8bit's moments stand for: constants, by their names in the library.
QMAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
BLOCK = 256  # numbers that share a scale in AdamW8bit
# Prodigy's estimate d, its largest, the sum that it is made of, and the steps so far.
GROUP_NUMBERS = ("d", "d_max", "d_numerator", "k")

_is_finite = schema.number(-1e30, 1e30)
_is_numbers = schema.record(
    {
        "steps": schema.mapping(schema.whole(0, 10**9)),
        "groups": schema.list_of(schema.mapping(_is_finite, schema.one_of(*GROUP_NUMBERS))),
    }
)


def save(folder: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Write the state into an existing folder, under the parameters' names."""
    tensors: Tensors = {}
    steps: dict[str, int] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in QMAPS:
                continue
            if isinstance(value, torch.Tensor):
                tensors[f"{name}:{key}"] = value.detach().cpu().contiguous()
            else:
                steps[name] = value
    write_tensors(folder / TENSORS, tensors)
    groups = [
        {key: float(group[key]) for key in _number_names(group)} for group in optimizer.param_groups
    ]
    if steps or any(groups):
        write_json(folder / NUMBERS, {"steps": steps, "groups": groups})


def read(folder: Path) -> tuple[Tensors, Any]:
    """The tensors and the numbers in a checkpoint; the latter are None if it has none."""
    numbers = folder / NUMBERS
    tensors = read_tensors(folder / TENSORS, allow_bytes=True)
    return tensors, read_json(numbers) if numbers.exists() else None


def restore(
    folder: Path,
    saved: tuple[Tensors, Any],
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Set what `read` found in a folder; raises UserError if it does not fit."""
    tensors, numbers = saved
    if numbers is not None and not _is_numbers(numbers):
        raise UserError(f"{folder / NUMBERS} is damaged", REMEDY)
    steps = numbers["steps"] if numbers else {}
    for name, parameter in parameters.items():
        values = {
            key.split(":")[1]: value for key, value in tensors.items() if key.startswith(f"{name}:")
        }
        if not _fits(optimizer, parameter, values, name in steps):
            raise UserError(f"{folder / TENSORS} does not fit its adapter", REMEDY)
        is_fused = optimizer.defaults.get("fused", False)
        state: dict[str, Any] = {
            key: _copy_for(parameter, key, value, is_fused) for key, value in values.items()
        }
        if name in steps:
            state["step"] = steps[name]
        if "absmax1" in state:
            maps = cast(Any, optimizer).name2qmap
            state |= {key: maps[kind].to(parameter.device) for key, kind in QMAPS.items()}
        optimizer.state[parameter] = state
    groups = numbers["groups"] if numbers else [{} for _ in optimizer.param_groups]
    if list(map(list, groups)) != list(map(_number_names, optimizer.param_groups)):
        raise UserError(f"{folder / NUMBERS} is missing or damaged", REMEDY)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: type(group[key])(value) for key, value in values.items()})


def _number_names(group: Mapping[str, Any]) -> list[str]:
    """The numbers that are saved of a parameter group."""
    return [key for key in GROUP_NUMBERS if key in group]


def _fits(
    optimizer: torch.optim.Optimizer,
    parameter: torch.nn.Parameter,
    values: Mapping[str, torch.Tensor],
    has_steps: bool,
) -> bool:
    """Whether these are the tensors of a parameter's state, all or, before its first step, none."""
    if not values and not has_steps:
        return True
    expected = state_tensors(optimizer, parameter)
    found = {key: (tuple(value.shape), value.dtype) for key, value in values.items()}
    if "p0" in expected and found.get("p0") == ((), torch.float32):
        found["p0"] = expected["p0"]  # Prodigy's short form of zeros
    return found == expected and has_steps == ("step" not in expected)


def state_tensors(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor in a parameter's state, by name."""
    shape, flat = tuple(parameter.shape), (parameter.numel(),)
    kind = type(optimizer).__name__
    if kind == "AdamW8bit" and parameter.numel() >= cast(Any, optimizer).args.min_8bit_size:
        return _eight_bit_tensors(shape, parameter.numel())
    shapes = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
    if kind == "AdamW8bit":
        shapes = {"state1": shape, "state2": shape}
    elif kind == "Prodigy":
        shapes = {"s": flat, "p0": flat, "exp_avg": shape, "exp_avg_sq": shape}
    return {key: (value, torch.float32) for key, value in shapes.items()}


def _eight_bit_tensors(
    shape: tuple[int, ...], numbers: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """AdamW8bit's moments as codes, and the scales of their blocks."""
    blocks = math.ceil(numbers / BLOCK)
    codes = dict.fromkeys(("state1", "state2"), (shape, torch.uint8))
    scales = dict.fromkeys(("absmax1", "absmax2"), ((blocks,), torch.float32))
    return {**codes, **scales}


def _copy_for(
    parameter: torch.nn.Parameter, key: str, value: torch.Tensor, is_fused: bool
) -> torch.Tensor:
    """A copy of one of the tensors for the parameter: what is read stays mapped to a file that may
    be deleted.

    Moments get the parameter's strides: the fused AdamW goes through both by address. The step
    count is on the CPU unless AdamW is fused.
    """
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    is_on_cpu = key == "step" and not is_fused
    return value.to(torch.device("cpu") if is_on_cpu else parameter.device, copy=True)

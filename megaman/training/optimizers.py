"""The optimizers that --optimizer names: torch's AdamW, and those of two optional libraries."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megaman.errors import WRONG_USAGE, UserError

if TYPE_CHECKING:
    from megaman.config.learning_settings import OptimizerConfig

LOW_PRODIGY_LR = 0.1  # no rate found so far would leave anything of it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """An optional package: its name and the version that was tried."""

    name: str
    version: str


# The same as pyproject.toml's extras, as a test checks.
LIBRARIES = {
    "adamw8bit": Library("bitsandbytes", "0.50.2"),
    "prodigy": Library("prodigyopt", "1.1.2"),
}


def require_library(optimizer: str) -> None:
    """Raise UserError if the library of an optimizer is not installed."""
    library = LIBRARIES.get(optimizer)
    if library and importlib.util.find_spec(library.name) is None:
        raise UserError(
            f"--optimizer {optimizer} needs the package {library.name}",
            f"pip install {library.name}=={library.version}",
            WRONG_USAGE,
        )


def create_optimizer(
    config: OptimizerConfig, groups: Sequence[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that the config names, over groups of parameters with a learning rate each.

    Raises UserError if its library is missing or does not run on the device.
    """
    require_library(config.optimizer)
    if config.optimizer == "adamw8bit":
        return _adamw8bit(config, groups, device)
    if config.optimizer == "prodigy":
        return _prodigy(config, groups)
    return torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=device.type != "mps",
    )


def _adamw8bit(
    config: OptimizerConfig, groups: Sequence[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, in blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861).

    Tensors below 4096 numbers keep moments in 32 bits.
    """
    if device.type == "mps":
        raise UserError(
            "--optimizer adamw8bit does not run on MPS", "Use --optimizer adamw", WRONG_USAGE
        )
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    for group in groups:
        for parameter in group["params"]:
            # The library does so at the first step. A resumed run has to compute alike before it.
            parameter.data = parameter.data.contiguous()
    return bitsandbytes.optim.AdamW8bit(
        list(groups),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def _prodigy(config: OptimizerConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Prodigy, which finds the learning rate (Mishchenko and Defazio 2023, arXiv 2306.06101), with
    the options of diffusers' example. --learning_rate is a factor on what it finds."""
    if config.learning_rate < LOW_PRODIGY_LR:
        log.info(
            "--learning_rate %g is a factor on the rate that Prodigy finds: 1 is usual",
            config.learning_rate,
        )
    import prodigyopt  # pyright: ignore[reportMissingImports]

    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return prodigyopt.Prodigy(
            list(groups),
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,  # pyright: ignore[reportArgumentType]
            use_bias_correction=True,
            safeguard_warmup=True,
        )

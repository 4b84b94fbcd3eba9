"""What a run does when memory runs out: gradient checkpointing, then smaller micro-batches. Neither
changes what a step computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from megaman.errors import UserError

if TYPE_CHECKING:
    from megaman.training.compute import TrainingCompute


def checkpoint_gradients(models: Sequence[torch.nn.Module]) -> None:
    """Have models recompute their activations in the backward pass instead of keeping them (Chen et
    al. 2016, arXiv 1604.06174).

    diffusers and transformers have different names for it.
    """
    for model in cast("Sequence[Any]", models):
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.enable_gradient_checkpointing()


def keep_activations(model: torch.nn.Module) -> None:
    """The opposite of checkpoint_gradients, for one model."""
    checkpointed = cast(Any, model)
    if hasattr(model, "activation_checkpointing_disable"):
        checkpointed.activation_checkpointing_disable()
    else:
        checkpointed.disable_gradient_checkpointing()


def reduce_memory(
    compute: TrainingCompute, models: Sequence[torch.nn.Module], resolution: int
) -> tuple[TrainingCompute, str]:
    """The settings after the next measure against too little memory, and the measure in words.

    Gradient checkpointing first, then smaller micro-batches: neither changes what a step computes.

    Args:
        models: those in training.
        resolution: side of the images in pixels.

    Raises:
        UserError: both measures are used up.
    """
    if not compute.gradient_checkpointing:
        checkpoint_gradients(models)
        return replace(compute, gradient_checkpointing=True), (
            "gradient checkpointing is on from here"
        )
    if batching := compute.micro_batching.smaller():
        return replace(compute, micro_batching=batching), (
            f"from here {batching.accumulation_steps} micro-batches of {batching.size} make a "
            "step, with the same effective batch size"
        )
    smaller = max(resolution * 3 // 4 // 8 * 8, 8)
    share = smaller**2 / resolution**2
    raise UserError(
        f"Even one image of {resolution} px at a time with gradient checkpointing is too much for "
        "this memory",
        f"--resolution {smaller} needs about {share:.0%} of it; or close other programs",
    )

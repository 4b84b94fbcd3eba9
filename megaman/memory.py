"""What to do when memory was not enough: make room step by step, and keep the mathematics of the run as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from megaman.errors import UserError, out_of_memory

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

Result = TypeVar("Result")


@dataclass
class Split:
    """How the pictures of one optimizer step are computed: count micro-batches of size pictures a process."""

    size: int
    count: int

    def shrink(self) -> bool:
        """Halve the micro-batch (or take its largest part) and accumulate the more; False where it is one picture."""
        if self.size == 1:
            return False
        smaller = next(part for part in range(self.size // 2, 0, -1) if self.size % part == 0)
        self.size, self.count = smaller, self.count * (self.size // smaller)
        return True


def until_it_fits(compute: Callable[[], Result], make_room: Callable[[], None]) -> Result:
    """The result of compute, which is called anew after make_room as often as memory runs out."""
    while True:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Only here, outside the handler, is the error gone, and with it the tensors of its frames.
        free()
        make_room()


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def checkpoint_gradients(models: Sequence[UNet2DConditionModel | CLIPTextModel]) -> None:
    """Have the models in training compute their activations anew in the backward pass instead of keeping them (Chen et
    al. 2016, arXiv 1604.06174); diffusers and transformers call it differently."""
    for model in models:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.enable_gradient_checkpointing()


def keep_activations(model: UNet2DConditionModel | CLIPTextModel) -> None:
    """The opposite of checkpoint_gradients, for one model."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.disable_gradient_checkpointing()


def make_room(models: Sequence[UNet2DConditionModel | CLIPTextModel], split: Split, size: int) -> str:
    """Take the next measure against too little memory in training and return it in words.

    First gradient checkpointing, then smaller micro-batches of which more are accumulated: neither changes what a step
    computes. Raises UserError where both are used up; models are those in training, the UNet first; size is the
    pictures' side in pixels.
    """
    if not models[0].is_gradient_checkpointing:
        checkpoint_gradients(models)
        return "gradient checkpointing is on from here"
    if split.shrink():
        return f"from here {split.count} micro-batches of {split.size} make a step, with the same effective batch"
    smaller = max(size * 3 // 4 // 8 * 8, 8)
    raise UserError(
        f"Even one picture of {size} px at a time with gradient checkpointing is too much for this memory",
        f"--resolution {smaller} needs about {smaller**2 / size**2:.0%} of it; or close other programs",
    )

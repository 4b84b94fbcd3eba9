"""The LoRAs of a generation: loaded together, scaled, switched off, fused into the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import UserError
from megaman.lora import adapter
from megaman.lora.files import load_loras, models_by_part, read_lora, short_hash

if TYPE_CHECKING:
    from megaman.models.base import Base


def misfits(base: Base, loras: Sequence[tuple[Path, float]]) -> dict[Path, str]:
    """The LoRAs among several that cannot be loaded into a base, with the reason."""
    reasons = {}
    for path, _ in loras:
        try:
            read_lora(path, models_by_part(base.unet, base.text_encoder))
        except UserError as error:
            reasons[path] = error.message
    return reasons


class LoraStack:
    """Several LoRAs on one base, addressed by their index.

    Args:
        base: the base, whose UNet and text encoder are changed.
        loras: path and strength of each LoRA; strength 1 is the scale that it was trained with.
        fuse: add the LoRAs to the base's own weights, which is faster; they cannot be switched
            off then.
        rescale: whether `set_scales` will be called more than once, which costs a copy of the
            weights if they are fused.

    Raises UserError if a LoRA is missing, damaged or made for another base.
    """

    def __init__(self, base: Base, loras: Sequence[tuple[Path, float]], fuse: bool, rescale: bool):
        self._models = [base.unet, base.text_encoder]
        self._loras = loras
        self.configs = load_loras(loras, base.unet, base.text_encoder)
        self.hashes = {path: short_hash(path) for path, _ in loras}
        self._fused = adapter.FusedLoras(self._models, reversible=rescale) if fuse else None

    def summary(self, scale: float) -> list[str]:
        """A line for each LoRA, with its strength if that is not 1 or if it is one of several.

        scale multiplies all strengths.
        """
        lines = []
        for config, (path, strength) in zip(self.configs, self._loras, strict=True):
            line = f"LoRA       rank {config.r}, alpha {config.lora_alpha:g}"
            if len(self._loras) > 1 or strength * scale != 1:
                line += f", strength {strength * scale:g}: {path}"
            lines.append(line)
        return lines

    @property
    def is_fused(self) -> bool:
        """Whether the LoRAs are part of the base's weights."""
        return self._fused is not None

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Activate the LoRAs with these indices, each at a factor on its trained scale."""
        if self._fused:
            self._fused.set_scales(scales)
        else:
            adapter.set_scales(self._models, scales)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the models are the base itself; for stacks that are not fused."""
        with adapter.lora_disabled(*self._models):
            yield

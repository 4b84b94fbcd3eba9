"""What megaman_lora.py answers in place of a run, apart from --check_data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig


def answer(config: TrainConfig) -> Iterable[str]:
    """The lines of --system_info, this machine and what is wrong with it, or of --plan, the memory
    that training would need."""
    if config.run.system_info:
        from megaman.training.system_info import system_info

        return system_info(config)
    from megaman.training.memory_plan import memory_table

    request, name = config.memory_request(), config.base.pretrained_model_name
    return memory_table(config.compute, request, name, config.cache.path())

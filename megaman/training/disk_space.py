"""What a run will write, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import plural

if TYPE_CHECKING:
    from megaman.config.train import TrainConfig

MOMENTS = 2  # of AdamW, for each parameter, in float32 as the parameter itself
LAYOUTS = 3  # lora_weights/ has the LoRA as PEFT, diffusers and kohya read it
BYTES = {"float": 4, "fp16": 2, "bf16": 2}  # of a value by --save_precision
SAMPLE_BYTES = 1.6  # of a pixel in a PNG, about


def disk_lines(
    config: TrainConfig, folder: Path, num_parameters: int, first: int, last: int
) -> Iterator[str]:
    """Lines about what the steps after first, up to last, will write into folder."""
    num_checkpoints = _num_checkpoints(config, first, last)
    checkpoint = 4 * (1 + MOMENTS) * num_parameters
    lora = LAYOUTS * BYTES[config.output.save_precision] * num_parameters
    total = num_checkpoints * checkpoint + lora + _sample_bytes(config, first, last)
    line = (
        f"disk       {plural(num_checkpoints, 'checkpoint')} of {size(checkpoint)}, the LoRA "
        f"{size(lora)}: about {size(total)} with the samples in {folder}"
    )
    free = free_bytes(folder)
    yield line if free is None else f"{line}, where {size(free)} are free"
    if free is not None and free < total:
        yield (
            f"warning    {folder} has less room than this run will need: free some, or add "
            "--checkpoints_total_limit"
        )


def _num_checkpoints(config: TrainConfig, first: int, last: int) -> int:
    """How many checkpoints will be there at once, in addition to those that are there now."""
    interval, limit = config.output.save_steps, config.output.checkpoints_total_limit
    count = last // interval - first // interval + int(last % interval > 0)
    return min(count, limit) if limit else count


def _sample_bytes(config: TrainConfig, first: int, last: int) -> float:
    validation, side = config.validation, config.data.resolution
    times = last // validation.validation_steps - first // validation.validation_steps + 1
    return times * validation.num_validation_images * SAMPLE_BYTES * side**2


def free_bytes(folder: Path) -> int | None:
    """The free bytes on the disk of a folder; None if the system does not report them."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def size(count: float) -> str:
    """Bytes for people: 3.2 MB, 41 GB."""
    for unit in ("KB", "MB", "GB"):
        count /= 1024
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"
    raise AssertionError

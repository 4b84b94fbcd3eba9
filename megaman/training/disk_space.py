"""What a run will write, and whether the disk has room for it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megaman.errors import plural
from megaman.hub import PROJECT

if TYPE_CHECKING:
    from megaman.config.train import TrainConfig
    from megaman.models.base import Base
    from megaman.training.optimizer import Schedule

MOMENTS = 2  # of AdamW, for each parameter, in float32 as the parameter itself
LAYOUTS = 3  # lora_weights/ has the LoRA as PEFT, diffusers and kohya read it
BYTES = {"float": 4, "fp16": 2, "bf16": 2}  # of a value by --save_precision
SAMPLE_BYTES = 1.6  # of a pixel in a PNG, about


def disk_lines(
    config: TrainConfig, schedule: Schedule, folder: Path, num_parameters: int, step: int
) -> Iterator[str]:
    """Lines about what the steps after this one will write into folder."""
    num_checkpoints = _num_checkpoints(config, schedule, step)
    evaluation = config.evaluation
    copies = int(evaluation.is_on) + int(evaluation.use_ema)  # the best LoRA, the EMA
    checkpoint = 4 * (1 + MOMENTS + copies) * num_parameters
    lora = LAYOUTS * BYTES[config.output.save_precision] * num_parameters
    num_loras = 2 if evaluation.is_on else 1
    total = num_checkpoints * checkpoint + num_loras * lora
    total += _sample_bytes(config, schedule, step)
    loras = "last and the best LoRA, each" if evaluation.is_on else "LoRA"
    line = (
        f"disk       {plural(num_checkpoints, 'checkpoint')} of {size(checkpoint)}, the {loras} "
        f"{size(lora)}: about {size(total)} with the samples in {folder}"
    )
    free = free_bytes(folder)
    yield line if free is None else f"{line}, where {size(free)} are free"
    if free is not None and free < total:
        yield (
            f"warning    {folder} has less room than this run will need: free some, or add "
            "--checkpoints_total_limit"
        )


def present_lines(cached: Iterable[Path], cache_dir: Path | None, base: Base) -> Iterator[str]:
    """A line about what the run has on the disk already: the latents in these files of the cache,
    and the base if it was downloaded."""
    parts = []
    if cache_dir is not None and (latents := _bytes_of(cached)):
        parts.append(f"latents {size(latents)} in {cache_dir}")
    places = (Path(base.name).expanduser(), PROJECT / base.name)
    if not any(place.exists() for place in places):
        parts.append(f"{base.name} {size(_bytes_of(base.files()))} from the hub")
    if parts:
        yield f"           on the disk already: {', '.join(parts)}"


def _bytes_of(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with contextlib.suppress(OSError):  # another run may have pruned it
            total += file.stat().st_size
    return total


def _num_checkpoints(config: TrainConfig, schedule: Schedule, step: int) -> int:
    """How many checkpoints will be there at once, in addition to those that are there now."""
    output, last = config.output, schedule.total_steps
    epochs = output.save_every_n_epochs
    interval = schedule.steps_of(epochs) if epochs else output.save_steps
    count = last // interval - step // interval + int(last % interval > 0)
    limit = output.checkpoints_total_limit
    return min(count, limit) if limit else count


def _sample_bytes(config: TrainConfig, schedule: Schedule, step: int) -> float:
    validation, last = config.validation, schedule.total_steps
    epochs = validation.validation_epochs
    interval = schedule.steps_of(epochs) if epochs else validation.validation_steps
    times = last // interval - step // interval + 1
    return times * validation.num_validation_images * SAMPLE_BYTES * config.data.resolution**2


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

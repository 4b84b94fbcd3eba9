"""What a run decides before it opens: missing captions, the seed, the state."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.training.checkpoint import TrainState
from megaman.training.output import choose_log_dir

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.processes import Processes
    from megaman.training.datasets import Datasets
    from megaman.training.output import OutputFolder


def complete_captions(
    config: TrainConfig, datasets: Datasets, processes: Processes, bar: Callable[..., Any]
) -> None:
    """Write the missing captions in one process with this bar (tqdm), read them in all, and add the
    affixes."""
    if config.captions.auto_caption:
        if processes.is_main:
            captioning = partial(bar, desc="captioning", unit="image")
            datasets.write_captions(config.captions.auto_caption, captioning)
        processes.exchange(None)
        datasets.reload()
    datasets.add_affixes(config.captions)


def choose_seed(
    config: TrainConfig, saved: TrainState | None, output: OutputFolder
) -> tuple[int, str]:
    """The seed and TensorBoard's folder: a resumed run keeps its seed and, if it resumes in place,
    its folder: elsewhere that is another run's."""
    seed = config.run.seed
    if seed is None:
        seed = saved.seed if saved else secrets.randbelow(2**31)
    log_dir = choose_log_dir(
        saved.log_dir if saved and output.resumes_in_place() else None,
        config.output.logging_dir,
        Path(config.output.output_dir),
    )
    return seed, str(log_dir)


def make_state(
    saved: TrainState | None,
    chosen: tuple[int, str],
    settings: dict[str, Any],
    datasets: Datasets,
    world_size: int,
) -> TrainState:
    """The state at the start: a resumed run keeps its step and its time. chosen are the seed and
    TensorBoard's folder."""
    seed, log_dir = chosen
    state = saved or TrainState(0, seed, log_dir, 0.0, settings)
    held_out = None if datasets.held_out is None else datasets.held_out_names
    return replace(
        state,
        seed=seed,
        log_dir=log_dir,
        settings=settings,
        held_out=held_out,
        world_size=world_size,
    )

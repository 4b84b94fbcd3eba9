"""The end of a run: lora_weights/ with its metadata and its model card, and the next command."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman.data import similarity
from megaman.data.palette import shared_palette
from megaman.errors import log_event, summarize_error
from megaman.lora import files as lora_files
from megaman.lora.peft_config import PALETTE_KEY
from megaman.models.typed import scheduler_config
from megaman.training import memorization, model_card, run_metadata
from megaman.training.output import save_somewhere
from megaman.training.summary import add_result, closing_lines

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.models.base import Base
    from megaman.training.adapters import Adapters
    from megaman.training.datasets import Datasets
    from megaman.training.run import Run

log = logging.getLogger(__name__)


def export_lora(
    config: TrainConfig,
    run: Run,
    base: Base,
    adapters: Adapters,
    datasets: Datasets,
    training_config: Mapping[str, Any],
) -> int:
    """Save the finished LoRA, in the main process, and end the run.

    Returns the exit code: 1 if the LoRA had to be saved in another place than lora_weights/.
    Raises UserError if it can be saved nowhere.
    """
    run.wait_for_everyone()
    is_in_place = True
    if run.is_main_process:
        seconds = run.elapsed
        folder, reason = _save(config, run, base, adapters, datasets, training_config)
        is_in_place = not reason
        if reason:
            log.info(
                "%s cannot be written (%s): the LoRA is in %s instead",
                run.output.lora_weights,
                reason,
                folder,
            )
        message = f"done in {seconds // 60:.0f} min {seconds % 60:.0f} s: {folder}"
        log_event(log, "done", message, path=str(folder), seconds=round(seconds, 1))
        for line in closing_lines(config, run):
            log.info(line)
        command = next_command(config, run, folder)
        log.info("next: %s", command)
        run.report.end("finished", lora=folder.as_posix(), generate=command)
    run.close()
    return 0 if is_in_place else 1


def _save(
    config: TrainConfig,
    run: Run,
    base: Base,
    adapters: Adapters,
    datasets: Datasets,
    training_config: Mapping[str, Any],
) -> tuple[Path, str]:
    """The folder in which the LoRA is saved, and the reason if it is not lora_weights/."""
    samples = run.output.samples_folder(training_config["total_steps"])
    metadata = dict(adapters.notes) | run_metadata.training_metadata(
        training_config,
        [dataset.by_folder() for dataset in datasets.all],
        scheduler_config(base.noise_scheduler).prediction_type,
        samples / "00.png",
        time.time() - run.elapsed,
        time.time(),
    )
    images = datasets.images
    paths = [example.image for example in images.examples]
    if palette := shared_palette(paths, config.data.background):
        metadata[PALETTE_KEY] = ",".join(palette)
    card = model_card.write_card(
        training_config, images.captions, images.num_written_captions, samples
    )
    add_result(run.log, run.history, training_config)
    extra_files = card | _training_images(config, run, datasets)
    run.log.close()
    save = partial(
        lora_files.save_lora,
        models=lora_files.models_by_part(adapters.unet, adapters.text_encoder),
        base_name=adapters.base_name,
        metadata=metadata,
        precision=config.output.save_precision,
        extra_files=extra_files,
    )
    return save_somewhere(run.output.lora_weights, save)


def _training_images(config: TrainConfig, run: Run, datasets: Datasets) -> dict[str, bytes]:
    """The files of the training images' descriptors, by which generation finds the nearest ones."""
    models: dict[str, str | None] = {similarity.FILE: None}
    if config.validation.clip_model is not None:
        models[similarity.CLIP_FILE] = config.validation.clip_model
    files = {}
    for file, model in models.items():
        try:
            images = memorization.describe_datasets(datasets, config.data, run.state.seed, model)
            files[file] = images.as_bytes()
        except Exception as error:  # an extra never costs the LoRA
            log.info("%s is not written (%s)", file, summarize_error(error))
    return files


def next_command(config: TrainConfig, run: Run, folder: Path) -> str:
    """The command that generates images with the LoRA in this folder."""
    flags = ["--demo"] if config.run.demo else []
    has_other_folder = "output_dir" in config.explicit or folder != run.output.lora_weights
    if not config.run.demo or has_other_folder:
        flags += ["--lora_path", folder.as_posix()]
    return shlex.join(["python", "generate_megaman.py", *flags])

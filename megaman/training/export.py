"""The end of a run: lora_weights/ with its metadata and its model card, and the next command."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaman import shell
from megaman.console import log_event
from megaman.data import similarity
from megaman.errors import UserError, summarize_error
from megaman.lora import files as lora_files
from megaman.lora import saving
from megaman.models.typed import scheduler_config
from megaman.training import memorization, model_card, run_metadata
from megaman.training.output import save_somewhere
from megaman.training.summary import add_result, closing_lines, curves_command

if TYPE_CHECKING:
    from megaman.config.settings import TrainConfig
    from megaman.models.base import Base
    from megaman.training.datasets import Datasets
    from megaman.training.evaluation import Evaluator
    from megaman.training.run import Run

log = logging.getLogger(__name__)


def export_lora(
    config: TrainConfig,
    run: Run,
    base: Base,
    evaluator: Evaluator,
    datasets: Datasets,
    training_config: Mapping[str, Any],
) -> int:
    """Save the finished LoRA, in the main process, and end the run.

    The best one on held-out images, if any are held out, is saved next to it in
    lora_weights_best/. With --early_stopping_patience lora_weights/ holds the best, too, and not
    the last.

    Returns the exit code: 1 if the LoRA had to be saved in another place than lora_weights/.
    Raises UserError if it can be saved nowhere.
    """
    run.wait_for_everyone()
    is_in_place = True
    if run.is_main_process:
        seconds = run.elapsed
        export = _Export(config, run, base, evaluator, datasets, training_config)
        add_result(run.log, run.history, training_config)
        run.log.close()
        folder, reason = export.save_all()
        is_in_place = not reason
        if reason:
            log.info(
                "%s cannot be written (%s): the LoRA is in %s instead",
                run.output.lora_weights,
                reason,
                folder,
            )
        for line in evaluator.results():
            log.info(line)
        message = f"done in {seconds // 60:.0f} min {seconds % 60:.0f} s: {folder}"
        log_event(log, "done", message, path=str(folder), seconds=round(seconds, 1))
        for line in closing_lines(config, run):
            log.info(line)
        command = next_command(config, run, folder)
        log.info("next: %s", command)
        curves = curves_command(config, run)
        run.report.end("finished", lora=folder.as_posix(), generate=command, tensorboard=curves)
    return 0 if is_in_place else 1


@dataclass(frozen=True)
class _Export:
    """Saves LoRAs of a run with their metadata and model cards."""

    config: TrainConfig
    run: Run
    base: Base
    evaluator: Evaluator
    datasets: Datasets
    training_config: Mapping[str, Any]

    def save_all(self) -> tuple[Path, str]:
        """Save lora_weights_best/ if there is a best LoRA, and lora_weights/; returns the folder in
        which the latter is saved, and the reason if it is another one."""
        evaluator, output = self.evaluator, self.run.output
        images = _training_images(self.config, self.run, self.datasets)
        if evaluator.best is None:
            return save_somewhere(output.lora_weights, self._saver(self.run.state.step, images))
        step = evaluator.best.step
        with evaluator.best_loaded():
            try:
                self._saver(step, images)(output.best_weights)
            except (OSError, UserError) as error:
                reason = summarize_error(error)
                log.info("%s cannot be written (%s)", output.best_weights, reason)
            if evaluator.prefers_best:
                return save_somewhere(output.lora_weights, self._saver(step, images))
        return save_somewhere(output.lora_weights, self._saver(self.run.state.step, images))

    def _saver(self, step: int, extra_files: Mapping[str, bytes]) -> Callable[[Path], None]:
        """A function that saves the LoRA in the models, which is that of this step, in a folder."""
        samples = self.run.output.samples_folder(step)
        training_config, total = dict(self.training_config), self.training_config["total_steps"]
        if step != total:
            training_config["total_steps"] = step
            training_config["epochs"] *= step / total
        images, adapters = self.datasets.images, self.evaluator.adapters
        metadata = dict(adapters.notes()) | run_metadata.training_metadata(
            training_config,
            [dataset.by_folder() for dataset in self.datasets.all],
            scheduler_config(self.base.noise_scheduler).prediction_type,
            samples / "00.png",
            time.time() - self.run.elapsed,
            time.time(),
        )
        card = model_card.write_card(
            training_config, images.captions, images.num_written_captions, samples
        )
        return partial(
            saving.save_lora,
            models=lora_files.models_by_part(adapters.unet, adapters.text_encoder),
            base_name=adapters.base_name,
            metadata=metadata,
            precision=self.config.output.save_precision,
            extra_files={**card, **extra_files},
        )


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
    return shell.join(["python", "generate_megaman.py", *flags])

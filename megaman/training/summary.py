"""The end of a run: what was gained, and where everything is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megaman.training.output import tensorboard_command

if TYPE_CHECKING:
    from megaman.config.train import TrainConfig
    from megaman.training.history import RunHistory
    from megaman.training.run import Run
    from megaman.training.tensorboard import TrainingLog

# The settings that TensorBoard's table of runs shows.
COMPARED = (
    "pretrained_model_name", "data_dir", "resolution", "lora_rank", "lora_alpha", "use_rslora",
    "lora_dropout", "learning_rate", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps",
    "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "snr_gamma",
    "noise_offset", "optimizer", "use_ema", "mixed_precision", "seed",
)  # fmt: skip


def closing_lines(config: TrainConfig, run: Run) -> Iterator[str]:
    """What was gained, and where page, samples and TensorBoard are; what could not be written is
    not named."""
    yield from gain_lines(run.history)
    if run.report.page.is_file():
        yield f"page       {run.report.page.resolve().as_uri()}"
    steps = [step for step, samples in run.history.samples.items() if samples]
    if steps:
        yield f"samples    {run.output.samples_folder(max(steps))}"
    if curves := curves_command(config, run):
        yield f"curves     {curves}"


def curves_command(config: TrainConfig, run: Run) -> str:
    """The command that shows the run's curves, "" if none could be written."""
    return tensorboard_command(config.output.logging_dir) if run.log.is_written else ""


def add_result(
    training_log: TrainingLog, history: RunHistory, training_config: Mapping[str, Any]
) -> None:
    """Add the last evaluations to TensorBoard, and settings and losses to its table of runs."""
    training_log.add_evaluations(history.evaluations)
    settings = training_config["settings"]
    shown = {name: settings[name] for name in COMPARED if name in settings}
    training_log.add_result(shown, final_losses(history), training_config["total_steps"])


def final_losses(history: RunHistory) -> dict[str, float | None]:
    """The losses by which runs are compared."""
    held_out = [item.loss for item in history.evaluations_of("held_out")]
    losses = {"final/loss_smoothed": next(iter(history.smoothed.values[-1:]), None)}
    if held_out:
        losses["final/held_out_loss"] = held_out[-1]
        losses["final/best_held_out_loss"] = min(filter(None, held_out), default=None)
    return losses


def gain_lines(history: RunHistory) -> Iterator[str]:
    """The held-out loss from the first evaluation to the best one, if there are two."""
    evaluations = [
        (item.loss, item.step)
        for item in history.evaluations_of("held_out")
        if item.loss is not None
    ]
    if len(evaluations) < 2:
        return
    first, start = evaluations[0]
    best, step = min(evaluations)
    change = f" ({100 * (best / first - 1):+.0f} %)" if first else ""
    yield f"gained     held-out loss {first:.4f} at step {start}, {best:.4f} at step {step}{change}"

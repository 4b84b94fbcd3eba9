"""What a run prints and records about itself before the first step."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from megaman.data import buckets
from megaman.data.dataset_summary import summarize
from megaman.data.problems import printable
from megaman.errors import plural
from megaman.files import write_json
from megaman.pages.browser import open_page
from megaman.runtime import device_lines, package_versions
from megaman.training.compute import INDENT, dtype_name, to_record
from megaman.training.disk_space import disk_lines, present_lines
from megaman.training.report import StepReport
from megaman.training.report_about import make_about

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from megaman.config.settings import TrainConfig
    from megaman.models.base import Base
    from megaman.training.adapters import Adapters
    from megaman.training.optimizer import Schedule
    from megaman.training.run import Run
    from megaman.training.samples import SamplePlan
    from megaman.training.training_set import TrainingSet

log = logging.getLogger(__name__)

MAX_PIXEL_ART = 3  # images whose names are logged


def announce(
    config: TrainConfig,
    run: Run,
    base: Base,
    training_sets: Sequence[TrainingSet],
    adapters: Adapters,
    schedule: Schedule,
) -> None:
    """Log what will happen."""
    lines = [
        *_data_lines(config, base, training_sets),
        _step_line(config, run, adapters, schedule),
        _lora_line(config, adapters),
        *device_lines(
            run.compute,
            run.compute.attention,
            f"{config.data.resolution} px",
            f"seed {run.state.seed}",
        ),
        *_float8_lines(config, run),
        *run.notes,
        *_resume_lines(config, run),
        *disk_lines(
            config,
            schedule,
            run.output.path,
            sum(parameter.numel() for parameter in adapters.parameters),
            run.state.step,
        ),
        *present_lines(
            chain.from_iterable(each.latents.files for each in training_sets),
            config.cache.path(),
            base,
        ),
    ]
    for line in lines:
        log.info(line)


def _data_lines(
    config: TrainConfig, base: Base, training_sets: Sequence[TrainingSet]
) -> Iterator[str]:
    first = training_sets[0]
    yield from summarize(first.dataset, first.latents.total_crops, config.data.random_flip)
    made = len(first.dataset) - first.dataset.num_written_captions
    if made and not config.captions.auto_caption:
        captions = plural(made, "caption")
        yield f"{INDENT}{captions} made from names: --auto_caption writes better ones"
    yield from first.latents.summary()
    yield from _pixel_art_line(training_sets)
    for other in training_sets[1:]:
        folder, weight = config.data.class_data_dir, config.loss.prior_loss_weight
        yield f"class      {len(other.dataset)} in {folder}, loss times {weight:g}"
    if config.buckets.enable_bucket:
        summary = buckets.summary(first.image_sizes(base.vae_scale_factor))
        yield f"buckets    {summary}; {first.batches.epoch_length} batches an epoch"


def _pixel_art_line(training_sets: Sequence[TrainingSet]) -> Iterator[str]:
    """The images that are enlarged like pixel art."""
    names = list(chain.from_iterable(each.dataset.pixel_art() for each in training_sets))
    if not names:
        return
    shown = ", ".join(names[:MAX_PIXEL_ART])
    if len(names) > MAX_PIXEL_ART:
        shown += f" and {len(names) - MAX_PIXEL_ART} more"
    yield f"pixel art  {len(names)} enlarged by nearest neighbor: {printable(shown)}"


def _step_line(config: TrainConfig, run: Run, adapters: Adapters, schedule: Schedule) -> str:
    optimizer = config.optimizer
    up_to = "up to " if config.buckets.enable_bucket else ""
    images = up_to + plural(run.step_images.count, "image")
    lr = f"{optimizer.lr_scheduler} learning rate up to {optimizer.learning_rate:g}"
    if adapters.text_encoder is not None:
        lr += f" and {optimizer.text_encoder_lr:g} (text encoder)"
    if optimizer.optimizer != "adamw":
        lr += f", {optimizer.optimizer}"
    shares = run.step_images.summary(run.world_size)
    return (
        f"steps      {schedule.total_steps} of {images} ({shares}), "
        f"{schedule.epochs:.1f} epochs, {lr}, {schedule.warmup_steps} warm-up"
    )


def _lora_line(config: TrainConfig, adapters: Adapters) -> str:
    parameters = adapters.parameters
    count = sum(parameter.numel() for parameter in parameters)
    rslora = " (rsLoRA)" if config.lora.use_rslora else ""
    line = (
        f"LoRA       rank {config.lora.lora_rank}, alpha {config.lora.lora_alpha:g}{rslora}, "
        f"{count:,} trainable parameters in {len(parameters) // 2} layers"
    )
    if adapters.text_encoder is not None:
        line += f", {len(adapters.text_encoder_parameters) // 2} of them in the text encoder"
    return line


def _float8_lines(config: TrainConfig, run: Run) -> Iterator[str]:
    if config.compute.base_precision == "fp8":
        slower = ", which is slower than without on a CPU" if run.device.type == "cpu" else ""
        yield f"{INDENT}the UNet is stored in fp8{slower}"


def _resume_lines(config: TrainConfig, run: Run) -> Iterator[str]:
    if not config.output.resume_from_checkpoint:
        return
    if run.output.checkpoint is None:
        yield "resuming   no checkpoint yet: starting from scratch"
        return
    yield f"resuming   {run.output.checkpoint}, step {run.state.step}"
    for later in run.output.later_checkpoints(run.state.step):
        yield f"{INDENT}{later} is later and stays until this run reaches its step"


def write_training_config(
    config: TrainConfig,
    run: Run,
    base: Base,
    training_sets: Sequence[TrainingSet],
    schedule: Schedule,
    samples: SamplePlan,
) -> dict[str, Any]:
    """Replace the outputs of an earlier run by training_config.json, in the main process, and show
    it in TensorBoard; returns its content."""
    dataset = training_sets[0].dataset
    sizes = training_sets[0].image_sizes(base.vae_scale_factor)
    content = {
        "settings": config.settings() | {"seed": run.state.seed, **_shown_prompt(config, samples)},
        "explicit": sorted(config.explicit),
        "base": base.name,
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "epochs": schedule.epochs,
        "buckets": buckets.record(dataset.buckets, sizes) if dataset.buckets else None,
        "device": str(run.device),
        "dtype": dtype_name(run.compute.dtype),
        "versions": package_versions(),
        "class_pictures": sum(len(other.dataset) for other in training_sets[1:]),
        "python": sys.version.split()[0],
        "log_dir": run.state.log_dir,
        "choices": to_record(run.compute),
    }
    if run.is_main_process:
        run.output.delete_previous_outputs()
        write_json(run.output.path / "training_config.json", content)
        text = f"```json\n{json.dumps(content, indent=2)}\n```"
        run.log.add("add_text", "settings", text, run.state.step)
        where = StepReport(run.state.step, schedule.total_steps, run.state.elapsed)
        run.report.begin(partial(make_about, config, run, dataset, content), where)
        if config.output.open:
            open_page(run.report.page)
        else:
            log.info("page       %s", run.report.page.resolve().as_uri())
    return content


def _shown_prompt(config: TrainConfig, samples: SamplePlan) -> dict[str, str]:
    """The prompt that is in force if it is made of the captions."""
    if config.validation.validation_prompts_file is not None or not samples.prompts:
        return {}
    return {"validation_prompt": samples.prompts[0].text}

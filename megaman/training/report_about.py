"""What stays the same on the page of a run: its name, data, settings and commands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from megaman.config.cli import flags_of, groups_of
from megaman.config.train import TrainConfig
from megaman.runtime import package_versions
from megaman.sequences import spread
from megaman.training.export import next_command
from megaman.training.output import tensorboard_command

if TYPE_CHECKING:
    from megaman.data.dataset import MegaManDataset
    from megaman.training.run import Run
    from megaman.training.thumbnails import Thumbnails

MAX_SHEET = 120  # images of the data that are shown
SHEET_SECONDS = 5.0  # for their small copies, if there are none from an earlier run


def make_about(
    config: TrainConfig,
    run: Run,
    dataset: MegaManDataset,
    training_config: Mapping[str, Any],
    thumbnails: Thumbnails,
) -> dict[str, Any]:
    """The page's content that is the same from the first step to the last."""
    folder = run.output.path
    return {
        "name": folder.resolve().name,
        "base": training_config["base"],
        "data_dir": str(dataset.data_dir),
        "epochs": round(training_config["epochs"], 1),
        "device": f"{training_config['device']}, {training_config['dtype']}",
        "versions": package_versions(),
        "sheet": _sheet(dataset, thumbnails),
        "num_images": len(dataset),
        "settings": list(_settings(config, training_config["settings"])),
        "commands": {
            "resume": config.resume_command(),
            "generate": next_command(config, run, run.output.lora_weights),
            "checkpoint": next_command(config, run, run.output.checkpoint_folder(0)),
            "tensorboard": tensorboard_command(config.output.logging_dir),
        },
    }


def _sheet(dataset: MegaManDataset, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Some of the images, with as many small copies as the time allows."""
    end = time.monotonic() + SHEET_SECONDS
    sheet = []
    for example in spread(dataset.examples, MAX_SHEET):
        file = thumbnails.of(example.image) if time.monotonic() < end else None
        if file:
            sheet.append({"file": file, "name": example.image.name, "caption": example.caption})
    return sheet


def _settings(config: TrainConfig, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The flags by group, as [name, value, whether it is the plain default]."""
    defaults = flags_of(TrainConfig)
    groups = []
    for group in groups_of(TrainConfig).values():
        rows = []
        for flag in fields(group):
            if flag.name in values:
                value = values[flag.name]
                default = _shown(defaults[flag.name].default)
                rows.append([flag.name, _shown(value), _shown(value) == default])
        groups.append({"heading": (group.__doc__ or "").strip(), "rows": rows})
    return groups


def _shown(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)

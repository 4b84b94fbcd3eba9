"""The LoRAs that a run has saved, each once, for --checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaman.errors import UserError
from megaman.files import digest_of, read_json
from megaman.safe_loading import read_header
from megaman.training.output import find_all

log = logging.getLogger(__name__)


def saved_loras(folder: Path) -> list[Path]:
    """All in a run's --output_dir, oldest first; raises UserError if there is none."""
    loras = different_loras(find_all(folder), folder / "lora_weights")
    if not loras:
        remedy = "Name the --output_dir of a training run"
        raise UserError(f"--checkpoints {folder} has no checkpoint", remedy)
    return loras


def different_loras(checkpoints: Sequence[Path], finished: Path) -> list[Path]:
    """The checkpoints and the finished LoRA, which is skipped if it is missing or equals one."""
    if not finished.is_dir():
        return list(checkpoints)
    content = _peft_content(finished)
    equal = [path for path in checkpoints if content and _peft_content(path) == content]
    if equal:
        log.info(f"{finished} equals {equal[-1].name}, which stands for it")
        return list(checkpoints)
    return [*checkpoints, finished]


def _peft_content(folder: Path) -> dict[str, Any]:
    """What a LoRA's images depend on, by file: tables and hashes of the tensors, and the
    configurations.

    A header's texts are not compared; safetensors writes them in another order each time.
    """
    content: dict[str, Any] = {}
    for path in sorted(folder.glob("**/adapter_model.safetensors")):
        tensors, data_start = read_header(path)
        content[path.relative_to(folder).as_posix()] = tensors, digest_of(path, data_start)
    for path in sorted(folder.glob("**/adapter_config.json")):
        config = read_json(path)
        if isinstance(config, dict):
            config = {**config, "base_model_name_or_path": None}
        content[path.relative_to(folder).as_posix()] = config
    return content

"""What a LoRA's files note about how to generate with it, under megaman.* in their headers.

    megaman.prompts               prompts made of the captions, as a JSON list
    megaman.guidance_scale        and megaman.num_inference_steps, megaman.scheduler,
                                  megaman.negative_prompt: what suits the base, as the flags take it
    megaman_palette               the colors of the pixel art that was trained on, as rrggbb,
                                  separated by commas

Written only if it differs from the flags' defaults. Files may come from a stranger: what has an
impossible value is ignored.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.config.values import GUIDANCE, STEPS, InvalidValueError, sampler, text
from megaman.errors import UserError
from megaman.lora import peft_config
from megaman.lora.peft_config import KOHYA_WEIGHTS, PEFT_WEIGHTS
from megaman.safe_loading import read_metadata

PREFIX = "megaman."
PROMPTS = f"{PREFIX}prompts"
PALETTE = "megaman_palette"
# The flags that a header may note, and how their values are read.
SETTINGS: dict[str, Callable[[str], Any]] = {
    "guidance_scale": GUIDANCE,
    "num_inference_steps": STEPS,
    "scheduler": sampler,
    "negative_prompt": text,
}
MAX_PROMPTS, MAX_PROMPT = 100, 2000  # characters of one
MAX_TAGS = 100_000  # of all folders of kohya's table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraNotes:
    """What a LoRA's files note.

    settings are values by flag; tag_counts and trigger are kohya's frequency of tags and
    Stability's trigger phrase, from which prompts can be made if none are noted.
    """

    prompts: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tag_counts: Mapping[str, int] = field(default_factory=dict)
    trigger: str = ""


def to_header(
    prompts: Sequence[str], settings: Mapping[str, Any], palette: Sequence[str] = ()
) -> dict[str, str]:
    """The keys of a LoRA's header for these prompts, settings and colors (rrggbb), none for what is
    empty."""
    header = {PROMPTS: json.dumps(list(prompts), ensure_ascii=False)} if prompts else {}
    if palette:
        header[PALETTE] = ",".join(palette)
    return header | {f"{PREFIX}{name}": str(value) for name, value in settings.items()}


def only_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those keys of a header that the files of every layout have."""
    return {
        key: value for key, value in metadata.items() if key.startswith(PREFIX) or key == PALETTE
    }


def read_notes(path: Path) -> LoraNotes:
    """What the LoRA at a path notes; nothing if its header cannot be read, which loading it reports
    better."""
    try:
        metadata = read_header(path)
    except (OSError, UserError):
        return LoraNotes()
    return LoraNotes(
        prompts=_read_prompts(path, metadata.get(PROMPTS)),
        settings=_read_settings(path, metadata),
        tag_counts=_read_tag_counts(metadata.get("ss_tag_frequency")),
        trigger=_short(metadata.get("modelspec.trigger_phrase", "")),
    )


def read_header(path: Path) -> dict[str, str]:
    """The header of kohya's file, which has most, or else of the file that is there.

    Raises OSError or UserError if it cannot be read.
    """
    found = peft_config.find(path)
    if found.is_file():
        return read_metadata(found)
    files = [found / name for name in (KOHYA_WEIGHTS, PEFT_WEIGHTS)]
    return next((read_metadata(file) for file in files if file.is_file()), {})


def _read_prompts(path: Path, value: str | None) -> list[str]:
    is_prompts = schema.list_of(schema.text(MAX_PROMPT), most=MAX_PROMPTS)
    content = _read_json(value)
    if value is not None and not is_prompts(content):
        log.info(f"{path}: the prompts in its header are damaged and ignored")
        return []
    prompts = [" ".join(prompt.split()) for prompt in content or []]
    return [prompt for prompt in prompts if prompt and prompt.isprintable()]


def _read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    settings = {}
    for name, parse in SETTINGS.items():
        value = metadata.get(f"{PREFIX}{name}")
        if value is None:
            continue
        try:
            settings[name] = parse(_short(value))
        except InvalidValueError as error:
            log.info(f"{path}: {PREFIX}{name} in its header is ignored ({error})")
    return settings


def _read_tag_counts(value: str | None) -> dict[str, int]:
    is_table = schema.mapping(schema.mapping(schema.whole(0, 10**9), most=MAX_TAGS), most=1000)
    content = _read_json(value)
    counts: Counter[str] = Counter()
    if is_table(content):
        for folder in content.values():
            counts.update({_short(tag): number for tag, number in folder.items()})
    counts.pop("", None)
    return dict(counts)


def _read_json(value: str | None) -> Any:
    try:
        return None if value is None else json.loads(value)
    except (ValueError, RecursionError):
        return None


def _short(value: str) -> str:
    """A stranger's text on one line without control characters, of bounded length."""
    line = " ".join(value[:MAX_PROMPT].split())
    return line if line.isprintable() else ""
